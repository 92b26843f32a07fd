"""LoRAtorio: patch by patch, the LoRA that departs furthest from the base has the most say (arXiv 2508.11624).

K + 1 predictions a step, the base's and each LoRA's alone, in one batch of rows. In each patch of the positive row the cosine of a LoRA's
prediction to the base's says how much the LoRA has to say there: weights are the softmin over LoRAs. The paper does not give its temperature and
patch size; here the cosines of all LoRAs and patches of a picture are standardised, the temperature is 1 and a patch an eighth of the picture a
side, and weights are interpolated between the centres of the patches, so that none shows an edge. The negative row is recentred as in the
paper: lambda of the base's and the rest of the mean of the LoRAs'. That holds for one LoRA too, so it is not Merge then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.run import Pass, Run


@dataclass(frozen=True)
class Options:
    tau: float = field(default=1.0, metadata={"ge": 0.01, "le": 100.0, "help": "Temperature of the softmin: lower gives a patch to one LoRA, higher to all alike."})
    patches: int = field(default=8, metadata={"ge": 1, "le": 64, "help": "Patches along each side of the picture."})
    recentre: float = field(default=0.5, metadata={"ge": 0.0, "le": 1.0, "help": "Share of the base in the negative row; 0: the mean of the LoRAs alone."})
    smooth: bool = field(default=True, metadata={"help": "Interpolate the weights between patches instead of a step at each edge."})


@method(title="LoRAtorio", about="Weighs the LoRAs' predictions patch by patch, the less weight the nearer to the base's.", paper="2508.11624",
        cost="K + 1", single=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    shares: dict[str, list[float]] = {}

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        if not live:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        base, *each = run.denoise_passes(step, [Pass({}, run.encode(use={})), *run.passes(step)])
        lone = torch.stack(each)
        say = weights(lone[:, -1], base[-1], options)
        rows = (say * lone[:, -1]).sum(0)[None]
        if run.guided:
            negative = options.recentre * base[0] + (1 - options.recentre) * lone[:, 0].mean(0)
            rows = torch.cat([negative[None], rows])
        if step.stage == 0:
            for name, share in zip(live, say.mean((1, 2, 3, 4)).tolist(), strict=True):
                shares.setdefault(name, []).append(round(share, 4))
        return Prediction(run.guide(rows), step.latents)

    yield predict
    run.notes["loratorio"] = {"share": shares}


def weights(each: Float[Tensor, "K B C H W"], base: Float[Tensor, "B C H W"], options: Options) -> Float[Tensor, "K B 1 H W"]:
    """What to multiply each LoRA's prediction by at every place: they sum to 1."""
    wide = torch.promote_types(base.dtype, torch.float32)
    (count, pictures), size = each.shape[:2], base.shape[-2:]
    grid = min(options.patches, size[0]), min(options.patches, size[1])

    def mean(product: Float[Tensor, "*_ C H W"]) -> Float[Tensor, "N 1 h w"]:
        """Over the channels and places of each patch."""
        return F.adaptive_avg_pool2d(product.sum(-3, keepdim=True).flatten(0, -4), grid)

    lone, other = each.to(wide), base.to(wide)
    lengths = mean(lone.square()).unflatten(0, (count, pictures)) * mean(other.square())
    cosine = mean(lone * other).unflatten(0, (count, pictures)) / lengths.clamp_min(1e-20).sqrt()
    spread, middle = torch.std_mean(cosine, (0, 2, 3, 4), correction=0, keepdim=True)
    say = (-(cosine - middle) / (options.tau * spread.clamp_min(1e-12))).softmax(0).flatten(0, 1)
    say = F.interpolate(say, size, mode="bilinear", align_corners=False) if options.smooth else F.interpolate(say, size, mode="nearest-exact")
    return say.unflatten(0, (count, pictures)).to(base.dtype)
