"""The scene that the parts share: three bundled LoRAs in one picture, for any method."""

from composition import Lora, Request, bundled
from composition.bundled import BUNDLES

MODELS = ("pocket", "pocket-flux")
LORAS = ("raccoon", "owl", "moon")
PROMPT = "a raccoon and an owl on the moon"
# CLoRA's full rounds of moves (20) would take most of the time and show nothing that two do not.
OPTIONS = {"clora": {"rounds": 2}}
TINY_OPTIONS = {"clora": {"rounds": 0}}


def there(model: str) -> bool:
    """Whether a bundled model and these LoRAs are in this copy of the repository."""
    bundle = BUNDLES[model]
    folder = bundled.path(bundle.model)
    weights = any(folder.glob("*/*.safetensors")) and (folder / "model_index.json").is_file()
    return weights and all((bundled.path(bundle.loras) / f"{name}.safetensors").is_file() for name in LORAS)


def request(method: str, *, count: int = 3, steps: int = 10, tiny: bool = False) -> Request:
    """`count` of the LoRAs by this method; each bound to its word, and with a third of the picture where the method reads regions.

    tiny: as cheap as it may be, for a processor.
    """
    loras = [Lora(name, binds=name, region=(k / count, 0.0, (k + 1) / count, 1.0) if method == "regions" else None)
             for k, name in enumerate(LORAS[:count])]
    options = (TINY_OPTIONS if tiny else OPTIONS).get(method, {})
    prompt = PROMPT if count > 2 else PROMPT.replace("the moon", "a hill")
    seed = 8 if tiny else 7  # tiny masks are of 4 x 4 cells: noise that leaves none between two concepts, where rounding would decide
    return Request(prompt, loras=loras, method=method, options=options, steps=steps, seed=seed, size=(64, 64) if tiny else None)
