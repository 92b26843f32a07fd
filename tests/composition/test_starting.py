"""A run that starts from a picture: held to the stock img2img pipelines, what a mask keeps, the hires pass; every method on every family."""

import threading
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from composition import Cancelled, Engine, Hires, Picture, Refused, Request, backbones, batch, manifest, methods, record, starting
from composition.backbones import schedulers
from composition.request import FITTED_NOTE, HIRES_NOTE, STARTED_NOTE
from tests import toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES

SIDE = laws.SIDE
# Each method on a UNet and on a transformer, in turn, and Merge on all.
CASES = [(family, name) for place, name in enumerate(methods.all()) for family in (("sd", "flux"), ("sdxl", "sd3"))[place % 2]]
CASES += [(family, "merge") for family in FAMILIES if (family, "merge") not in CASES]
STOCK = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline", "sd3": "StableDiffusion3Img2ImgPipeline",
         "flux": "FluxImg2ImgPipeline"}  # fmt: skip


@pytest.fixture(autouse=True)
def shapes_checked_once(request):
    """Shapes are checked by one test alone."""
    if request.node.originalname != "test_shapes":
        request.getfixturevalue("shapes_unchecked")


def photo(path, size=(SIDE, SIDE), seed=0):
    """A picture of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


def half(path, size=(SIDE, SIDE)):
    """A mask: the right half is painted anew."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    mask.save(path)
    return str(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return photo(folder / "photo.png"), half(folder / "mask.png")


def pixels(image):
    return np.asarray(image.convert("RGB"))


# held to diffusers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "sampler"), [("sd", "ddim"), ("sd", "euler"), ("sd", "default"), ("sd", "heun"), ("sd", "dpm++2m"), ("sd", "euler-a"),
                                                 ("sdxl", "ddim"), ("sdxl", "euler"), ("sd3", "default"), ("flux", "default")])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_stock_img2img(family, sampler, strength, engines, given):
    """The same latents as the stock pipeline's from the same seed: the step it starts at, the noise, the draw of the autoencoder."""
    pipe = FAMILIES[family](dtype=torch.float64)
    pipe.vae.register_to_config(force_upcast=False)  # SDXL's would round the weights to float32
    asked = laws.request("merge", steps=7, sampler=sampler, negative="an owl", picture=Picture(given[0], strength=strength))
    scheduler = schedulers.make(sampler, pipe.scheduler)
    parts = {**pipe.components, "scheduler": scheduler} | ({"requires_safety_checker": False} if family == "sd" else {})
    stock = getattr(diffusers, STOCK[family])(**parts)
    stock.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 4.0, "negative_prompt": asked.negative}
    if family == "sd3":
        call |= {"height": SIDE, "width": SIDE}
    if family == "flux":
        call = {"true_cfg_scale": 4.0, "negative_prompt": asked.negative, "height": SIDE, "width": SIDE, "max_sequence_length": toys.T5_TOKENS}
    with torch.no_grad():
        right = stock(prompt=asked.prompt, image=Image.open(given[0]), strength=strength, num_inference_steps=7, output_type="latent",
                      generator=[torch.Generator().manual_seed(asked.seed)], **call).images
    if family == "flux":
        right = diffusers.FluxPipeline._unpack_latents(right, SIDE, SIDE, pipe.vae_scale_factor)
    laws.same(laws.latents(engines[family], asked), right, 1e-6)


def test_a_strength_too_small_for_a_step_runs_one(engines, given):
    for family in ("sd", "flux"):
        result = engines[family].run(laws.request("merge", steps=4, picture=Picture(given[0], strength=0.01)))
        assert result.notes[STARTED_NOTE] == {"file": "photo.png", "strength": 0.01, "steps": 1, "of": 4}


# what steps mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_steps_are_those_that_run(family, engines, given, lora_files):
    """A method counts the steps that run, from 0; start and end of a LoRA are parts of these."""
    engine, (one, two, _) = engines[family], laws.loras_of(lora_files[family])
    sampler = "default" if engine.backbone.joint else "euler"
    asked = laws.request("switch", one, two, steps=8, sampler=sampler, picture=Picture(given[0], strength=0.5), options={"tau": 1})
    seen, events = [], []
    with pytest.MonkeyPatch.context() as patch:
        honest = engine.adapters.use
        patch.setattr(engine.adapters, "use", lambda weights: (seen.append(set(weights)), honest(weights))[1])
        engine.run(asked, on_step=events.append)
    assert [(event.index, event.count) for event in events] == [(n, 4) for n in (1, 2, 3, 4)]
    assert seen == [{asked.names[0]}, {asked.names[1]}] * 2
    late = replace(asked, method="merge", options={}, loras=[replace(one, start=0.5)])
    early, whole = laws.latents(engine, replace(late, loras=[])), laws.latents(engine, late)
    laws.differ(whole, early)
    steps = []
    engine.run(late, on_step=lambda event: steps.append(event.latents.clone()))
    plain = []
    engine.run(replace(late, loras=[]), on_step=lambda event: plain.append(event.latents.clone()))
    assert [torch.equal(a, b) for a, b in zip(steps, plain, strict=True)] == [True, True, False, False]


# what a mask keeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), CASES)
def test_kept_to_the_bit(family, name, engines, given, lora_files):
    """Every method on every family: the black half is the given picture's, the white one is not; the same seed gives the same bytes."""
    asked = laws.request(name, *laws.loras_of(lora_files[family]), steps=3, picture=Picture(given[0], strength=0.8, mask=given[1], soft=2))
    image, old = pixels(engines[family].run(asked).images[0]), pixels(Image.open(given[0]))
    assert np.array_equal(image[:, : SIDE // 2], old[:, : SIDE // 2])
    assert not np.array_equal(image[:, SIDE // 2 :], old[:, SIDE // 2 :])
    assert np.array_equal(pixels(engines[family].run(asked).images[0]), image)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpm++2m", "euler-a", "default"])
def test_kept_latents_have_the_noise_of_their_step(family, sampler, engines, given):
    """After every step the kept half of the latents is the encoded picture with the noise of the next time, after the last without."""
    engine = engines[family]
    if engine.backbone.joint and sampler not in ("euler", "default"):
        pytest.skip("a flow has its own sampler alone")
    asked, _ = engine.settle(laws.request("merge", steps=5, sampler=sampler, picture=Picture(given[0], strength=0.8, mask=given[1])))
    part = starting.passes(asked, engine.backbone)[0]
    generators = [torch.Generator().manual_seed(asked.seed)]
    clean = engine.backbone.encode_pixels(starting.pixels([Image.open(given[0])]), generators)
    noise = engine.backbone.noise(tuple(clean.shape), generators)
    scheduler = schedulers.make(sampler, engine.backbone.scheduler, 5)
    times = engine.backbone.schedule(part.whole, scheduler)
    seen = []
    engine.run(asked, on_step=lambda event: seen.append(event.latents.clone()))
    begin = (5 - len(seen)) * scheduler.order
    ends = [place + 1 for place, following in enumerate([*schedulers.stages(scheduler, len(times) - begin)[1:], (len(seen), 0)]) if following[1] == 0]
    wide = clean.shape[-1] // 2
    for latents, end in zip(seen, ends, strict=True):
        place = begin + end
        if place >= len(times):
            expected = clean
        elif engine.backbone.joint:
            sigma = scheduler.sigmas[place].double()
            expected = sigma * noise + (1 - sigma) * clean
        elif type(scheduler).__name__.startswith(("Euler", "Heun")):
            expected = clean + noise * scheduler.sigmas[place].double()
        else:
            alpha = scheduler.alphas_cumprod[times[place].long()].double()
            expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        laws.same(latents[..., :wide], expected[..., :wide], 1e-3 if sampler == "dpm++2m" else 1e-5)


def test_the_edge_is_soft(engines, given):
    """Inside the white the new picture comes in over so many pixels; a grey of the mask is a share."""
    new, old = Image.new("RGB", (SIDE, SIDE), "white"), Image.new("RGB", (SIDE, SIDE), "black")
    row = pixels(starting.composed(new, old, Image.open(given[1]), 3))[5, :, 0]
    assert list(row) == [0] * 8 + [64, 128, 191, 255] + [255] * 4
    assert set(pixels(starting.composed(new, old, Image.open(given[1]), 0))[5, :, 0]) == {0, 255}
    assert pixels(starting.composed(new, old, Image.new("L", (SIDE, SIDE), 51), 0))[0, 0, 0] == 51


def test_a_mask_white_everywhere_at_strength_1_is_text_to_image_noise(engines, given, tmp_path):
    """Nothing of the picture is left: another picture gives the same one."""
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "white.png")
    asked = laws.request("merge", picture=Picture(given[0], strength=1.0, mask=str(tmp_path / "white.png"), soft=0))
    other = replace(asked, picture=replace(asked.picture, image=photo(tmp_path / "other.png", seed=5)))
    assert engines["sd"].run(asked).images[0].tobytes() == engines["sd"].run(other).images[0].tobytes()


# laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_two_in_a_batch_are_two_singles(family, engines, given, lora_files, monkeypatch):
    engine = engines[family]
    asked = laws.request("composite", *laws.loras_of(lora_files[family]), steps=3, count=2, hires=Hires(1.5, 0.7),
                         picture=Picture(given[0], strength=0.8, mask=given[1]))
    singles = [engine.run(asked.alone(index)).images[0].tobytes() for index in range(2)]
    assert singles[0] != singles[1]
    assert [image.tobytes() for image in engine.run(asked).images] == singles
    monkeypatch.setattr(engine, "together", 2)
    for image, single in zip(engine.run(asked).images, singles, strict=True):
        assert np.abs(pixels(image).astype(int).ravel() - np.frombuffer(single, np.uint8).astype(int)).max() <= 1


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_nothing_stays(family, engines, given, lora_files):
    engine = engines[family]
    asked = laws.request("merge", *laws.loras_of(lora_files[family]), steps=3, hires=Hires(1.5, 0.7),
                         picture=Picture(given[0], strength=0.8, mask=given[1]))
    laws.leaves_nothing(engine, asked)
    before = laws.fingerprint(engine)
    for stop in (0, 1, 3):
        flag = threading.Event()
        if not stop:
            flag.set()
        counted = []

        def watch(event, stop=stop, flag=flag, counted=counted):
            counted.append(event.index)
            if event.index == stop:
                flag.set()

        with pytest.raises(Cancelled):
            engine.run(asked, cancel=flag, on_step=watch)
        assert counted == list(range(1, stop + 1)), "no step after the cancel"
        assert laws.fingerprint(engine) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_half_precision(family, dtype, given):
    """Close to single precision, in which the draws of both are made."""
    engine, exact = (Engine(backbones.of(FAMILIES[family](dtype=kind), family), "toy") for kind in (dtype, torch.float32))
    asked = laws.request("merge", steps=5, picture=Picture(given[0], strength=0.6, mask=given[1]))
    rough, right = (laws.latents(each, asked).double() for each in (engine, exact))
    error = float((rough - right).square().mean().sqrt() / right.std())
    assert 0 < error < (0.06 if dtype is torch.bfloat16 else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_is_reproducible(family, engines, given):
    """The same seed draws the same latents of a picture, whatever is beside it in the batch; the draw is around what the autoencoder says."""
    backbone, picture = engines[family].backbone, starting.pixels([Image.open(given[0])])

    def drawn(*seeds):
        return backbone.encode_pixels(picture.repeat(len(seeds), 1, 1, 1), [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(drawn(3), drawn(3))
    assert torch.equal(drawn(4, 3)[1:], drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family, engines, given, monkeypatch):
    """Every shape in a signature is that of what is passed, two pictures in a batch that are not square."""
    engine = engines[family]
    monkeypatch.setattr(engine, "together", 2)
    asked = laws.request("merge", steps=2, count=2, size=(16, 32), picture=Picture(given[0], strength=0.8, mask=given[1]), hires=Hires(1.5))
    assert [image.size for image in engine.run(asked).images] == [(24, 48)] * 2
    engine.run(replace(asked, picture=None, hires=Hires(1.5, space="latent")))


# hires -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_hires(family, space, engines, lora_files):
    """The second pass is a run from the enlarged first picture, with steps of its own; its size is what the model takes."""
    engine = engines[family]
    unit = engine.backbone.unit
    plain = laws.request("composite", *laws.loras_of(lora_files[family]), steps=3)
    asked = replace(plain, hires=Hires(1.4, strength=0.5, steps=4, space=space))
    side = round(SIDE * 1.4 / unit) * unit
    events = []
    result = engine.run(asked, on_step=events.append)
    assert result.images[0].size == (side, side)
    assert result.notes[HIRES_NOTE] == {"size": f"{side}x{side}", "strength": 0.5, "steps": 2, "of": 4}
    assert [(event.index, event.count) for event in events] == [(n, 5) for n in range(1, 6)]
    assert result.request.hires == asked.hires and result.request.size == (SIDE, SIDE)
    if space == "pixel":
        first = engine.run(plain).images[0].resize((side, side), Image.Resampling.LANCZOS)
        again = replace(plain, size=(side, side), steps=4, picture=Picture(starting.pictures.lossless(first), strength=0.5))
        assert engine.run(again).images[0].tobytes() == result.images[0].tobytes()


def test_regions_stay_valid_in_the_hires_pass(engines, lora_files):
    one, two, _ = laws.loras_of(lora_files["sd"])
    placed = [replace(one, region=(0.0, 0.0, 0.5, 1.0)), replace(two, region=(0.5, 0.0, 1.0, 1.0))]
    assert engines["sd"].run(laws.request("regions", *placed, steps=3, hires=Hires(2.0))).images[0].size == (2 * SIDE, 2 * SIDE)


# the request and its record --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "words"), [
    ({"picture": {"image": "a.png", "strength": 0}}, "strength"), ({"picture": {"image": "a.png", "strength": 1.1}}, "strength"),
    ({"picture": {"mask": "m.png"}}, "image"), ({"picture": {"image": "a.png", "soft": -1}}, "soft"),
    ({"picture": {"image": "a.png", "fit": "tile"}}, "fit"), ({"hires": {"factor": 1}}, "factor"), ({"hires": {"factor": 9}}, "factor"),
    ({"hires": {"strength": 0}}, "strength"), ({"picture": {"image": "a.png", "mask": "m.png"}, "hires": {"space": "latent"}}, "in pixels"),
])  # fmt: skip
def test_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        Request(prompt="a fox", **fields)


def test_a_hires_pass_too_large_is_refused_before_it_begins(engines):
    with pytest.raises(Refused, match="hires 4: its pass would have 12000x12000 pixels"):
        engines["sd"].run(laws.request("merge", size=(3000, 3000), hires=Hires(4.0)))


def test_a_request_without_a_picture_is_written_as_before():
    text = Request(prompt="a fox").json()
    assert "picture" not in text and "hires" not in text
    asked = Request(prompt="a fox", picture=Picture("photo.png", mask="mask.png"), hires=Hires())
    assert Request.read(asked.json()) == asked


def test_the_record_holds_the_picture(engines, given, tmp_path):
    """Recalled from the record alone, the same picture; no path is in it."""
    result = engines["sd"].run(laws.request("merge", steps=3, picture=Picture(given[0], strength=0.8, mask=given[1])))
    path = record.save(result, tmp_path)
    found = record.read(path)
    assert found.picture.image.startswith("data:") and "photo.png" in found.picture.image and str(tmp_path.parent) not in found.json()
    assert "/" not in record.details(path).notes[STARTED_NOTE]["file"]
    assert engines["sd"].run(replace(record.by_name(found), model="toy")).images[0].tobytes() == result.images[0].tobytes()
    for picture in (Picture(given[0]), Picture(found.picture.image, mask=given[1])):
        with pytest.raises(Refused, match="--allow-paths"):
            record.by_name(replace(found, picture=picture))


def test_a_batch_names_its_pictures_by_what_they_start_from(tmp_path):
    """Lines of a manifest with pictures: what is there is not made again, another mask is another picture."""
    image, mask = photo(tmp_path / "photo.png", (32, 32)), half(tmp_path / "mask.png", (32, 32))
    line = {"prompt": "a fox", "steps": 2, "size": [32, 32], "picture": {"image": image, "strength": 0.5}, "hires": {"factor": 1.5}}
    rows = [line, line | {"picture": line["picture"] | {"mask": mask}}, line]
    asked = [manifest.request_of(row, "toy") for row in rows]
    engine = Engine(backbones.of(toys.sd(), "sd"), "toy")
    first, second = (list(batch.run_many(engine, asked, tmp_path / "made")) for _ in range(2))
    assert [item.error for item in first] == [""] * 3 and [item.fresh for item in first] == [True, True, False]
    assert not any(item.fresh for item in second)
    assert first[0].id == first[2].id != first[1].id
    assert Image.open(first[0].path).size == (48, 48)


# fitting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "contain", "stretch"])
def test_another_shape_is_fitted(fit, engines, tmp_path):
    engine, image = engines["sd"], photo(tmp_path / "wide.png", (40, 20))
    mask = half(tmp_path / "mask.png", (20, 10))
    settled, notes = engine.settle(laws.request("merge", picture=Picture(image, mask=mask, fit=fit)))
    assert "from 40x20 to 16x16" in notes[FITTED_NOTE]
    assert engine.settle(settled) == (settled, {})
    fitted, white = starting.pictures.start(settled.picture.image), starting.repaint(settled.picture, (SIDE, SIDE))
    assert fitted.size == white.size == (SIDE, SIDE)
    assert white.getpixel((0, 8)) < 8 and white.getpixel((15, 8)) > 247
    assert (white.getpixel((0, 0)) == 255) is (fit == "contain"), "borders that were made up are painted anew"


def test_its_own_shape_is_kept(engines, tmp_path):
    """Without a size the picture's shape is taken, at about the pixels of the model's own."""
    settled, _ = engines["sd"].settle(laws.request("merge", size=None, picture=Picture(photo(tmp_path / "wide.png", (400, 100)))))
    assert settled.size == (64, 16)
    settled, notes = engines["sd"].settle(laws.request("merge", size=None, picture=Picture(photo(tmp_path / "fits.png", (36, 30)))))
    assert settled.size == (36, 30) and not notes


def test_odd_pictures(engines, tmp_path):
    """Upright by EXIF; transparency on a ground; a palette; what is no picture, too small or black is refused in a sentence."""
    engine = engines["sd"]
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert engine.settle(laws.request("merge", size=None, picture=Picture(str(tmp_path / "turned.jpg"))))[0].size == (20, 40)
    Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (SIDE, SIDE), 3).save(tmp_path / "palette.png")
    for name in ("clear.png", "palette.png"):
        assert engine.run(laws.request("merge", steps=1, picture=Picture(str(tmp_path / name)))).images
    (tmp_path / "no.png").write_text("no picture")
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    Image.new("L", (4, 40)).save(tmp_path / "thin.png")
    for fields, words in (({"image": "no.png"}, "cannot be read as a picture"), ({"image": "gone.png"}, "is not there"), ({"image": "thin.png"}, "4x40"),
                          ({"image": "palette.png", "mask": "black.png"}, "black everywhere")):
        fields = {key: str(tmp_path / name) for key, name in fields.items()}
        with pytest.raises(Refused, match=words):
            engine.run(laws.request("merge", picture=Picture(**fields)))
