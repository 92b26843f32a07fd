"""LoRA-LEGO, ranks, top-k, entropy, depth, K-LoRA, LoRAtorio against loops over explicit vectors and dense updates, in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from app.remarks import remarks
from composition.adapters.stack import Product
from composition.loop import Step
from composition.methods import depth, entropy, k_lora, lego, loratorio
from composition.methods.shared.canonical import canonical, singular
from tests.composition import laws
from tests.composition.test_stack import LAYERS, RANKS, build

RNG = torch.Generator().manual_seed(0)
CATEGORIES = ("character", "style", "object")


def drawn(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


@pytest.fixture(params=["sd", "flux"])
def case(request, engines, lora_files):
    loras = laws.loras_of(lora_files[request.param])
    return engines[request.param], [replace(lora, category=kind) for lora, kind in zip(loras, CATEGORIES, strict=True)]


class Layer:
    """A linear layer of a denoiser with its LoRAs' dense updates, and what reaches it in one evaluation."""

    def __init__(self, engine, asked, path):
        self.path, self.engine, self.asked = path, engine, asked

    def through(self, method):
        """(x, layer's update, dense update of each LoRA at its weight) of a method's first evaluation."""
        from composition import methods

        with laws.opened(self.engine, self.asked) as (run, times, start):
            seen, layer = {}, run.adapters.stacks()[self.path]
            module = dict(run.backbone.denoiser.named_modules())[self.path]
            weights = list(run.loras.values())
            dense = [layer.delta([lora.weight if i == k else 0.0 for i in range(len(weights))], torch.device("cpu"), torch.float64)
                     for k, lora in enumerate(weights)]

            def see(module, args, output):
                seen.setdefault("out", (args[0].clone(), output.clone()))

            handle = module.register_forward_hook(see)
            kind = methods.find(method)
            with kind.compose(run, kind.read(self.asked.options)) as predict:
                predict(Step(0, len(times), times[0], start))
            handle.remove()
            x, out = seen["out"]
            return x, out - nn.functional.linear(x, module.weight, module.bias), dense


PATHS = {"sd": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "flux": "single_transformer_blocks.0.attn.to_q"}


def routed(case, method, **options):
    engine, loras = case
    return Layer(engine, laws.request(method, *loras, options=options), PATHS[engine.backbone.family]).through(method)


def standard(x, dense):
    """|w B A x| of each LoRA at each token, over its mean over the tokens, by loops."""
    out = torch.zeros(*x.shape[:2], len(dense), dtype=torch.float64)
    for row in range(x.shape[0]):
        for k, update in enumerate(dense):
            loud = [float((update @ token).norm()) for token in x[row]]
            for place, value in enumerate(loud):
                out[row, place, k] = value / (sum(loud) / len(loud))
    return out


def gated(x, dense, gates):
    """The layer's update under gates by token and LoRA."""
    return torch.stack([torch.stack([sum(gate * (update @ token) for gate, update in zip(each, dense, strict=True))
                                     for token, each in zip(tokens, rows, strict=True)]) for tokens, rows in zip(x, gates, strict=True)])


@pytest.mark.parametrize("kind", LAYERS)
def test_canonical_factors_are_the_same_updates(kind):
    _, _, factors, gates, stack = build(kind)
    before = stack.product(torch.zeros(0, dtype=torch.float64))
    after = canonical(before)
    for begin, end in stack.spans:
        flat = lambda product, span=slice(begin, end): product.up[:, span] @ product.down.flatten(1)[span]  # noqa: E731
        torch.testing.assert_close(flat(after), flat(before), rtol=0, atol=1e-10)
        up = after.up[:, begin:end]
        torch.testing.assert_close(up.T @ up, torch.eye(end - begin, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_layer_with_less_room_than_ranks():
    product = Product(drawn(8, 5), drawn(3, 8), torch.tensor([0] * 5 + [1] * 3))
    after = canonical(product)
    for k in (0, 1):
        mine = product.owner == k
        torch.testing.assert_close(after.up[:, mine] @ after.down[mine], product.up[:, mine] @ product.down[mine], rtol=0, atol=1e-10)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top", [1, 2])
def test_topk_is_its_formula(case, top, renormalize):
    x, update, dense = routed(case, "topk", top=top, renormalize=renormalize)
    scores, weights = standard(x, dense), [lora.weight for lora in case[1]]
    gates = torch.zeros_like(scores)
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            best = sorted(range(3), key=lambda k, at=scores[row, place]: -at[k])[:top]
            factor = sum(weights) / sum(weights[k] for k in best) if renormalize else 1.0
            gates[row, place, best] = factor
    torch.testing.assert_close(update, gated(x, dense, gates), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.95, "top": 2, "index": 1.0, "temperature": 0.6}])
def test_entropy_is_its_formula(case, options):
    x, update, dense = routed(case, "entropy", **options)
    set_to = entropy.Options(**options)
    scores = standard(x, dense)

    def tsallis(p):
        return -sum(v * math.log(v) for v in p) if set_to.index == 1 else (1 - sum(v**set_to.index for v in p)) / (set_to.index - 1)

    gates, soft = torch.zeros_like(scores), 0
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            powers = [math.exp(float(s) / set_to.temperature) for s in scores[row, place]]
            p = [power / sum(powers) for power in powers]
            if tsallis(p) >= set_to.threshold * tsallis([1 / 3] * 3):
                soft += 1
                gates[row, place] = torch.tensor([3 * v for v in p], dtype=torch.float64)
            else:
                gates[row, place, sorted(range(3), key=lambda k, p=p: -p[k])[: set_to.top]] = 1.0
    assert 0 < soft < x.shape[0] * x.shape[1]
    torch.testing.assert_close(update, gated(x, dense, gates), rtol=0, atol=1e-9)


def test_entropy_of_equal_scores_is_merge():
    live = torch.tensor([[[True, True, False]]])
    gates, soft = entropy.hybrid(torch.tensor([[[1.0, 1.0, 0.0]]]), live, entropy.Options(threshold=1.0))
    assert soft.all() and torch.allclose(gates, torch.tensor([[[1.0, 1.0, 0.0]]]))


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_ranks_is_its_formula(case, share):
    """The strongest rank-ones of all LoRAs by a dense SVD each."""
    x, update, dense = routed(case, "ranks", share=share)
    pieces = []
    for part in dense:
        u, s, v = torch.linalg.svd(part, full_matrices=False)
        pieces += [(float(s[i]), u[:, i], v[i]) for i in range(len(s)) if s[i] > 1e-9 * s[0]]
    count = round(share * max(int(torch.linalg.matrix_rank(part)) for part in dense))
    for row in range(x.shape[0]):
        for place, token in enumerate(x[row]):
            strengths = sorted(((s * float(v @ token), u) for s, u, v in pieces), key=lambda piece: -abs(piece[0]))
            expected = sum(strength * u for strength, u in strengths[:count])
            torch.testing.assert_close(update[row, place], expected, rtol=0, atol=1e-9)


def test_a_single_lora_may_be_thinned_out(case):
    x, update, dense = Layer(case[0], laws.request("ranks", case[1][0], options={"share": 0.5}), PATHS[case[0].backbone.family]).through("ranks")
    assert not torch.allclose(update, x @ dense[0].T)


# LoRA-LEGO -------------------------------------------------------------------------------------------------------------


def parts_of(*ranks, wide=12, high=10):
    return [singular(drawn(rank, wide), drawn(high, rank)) for rank in ranks]


def explicit(parts, count, mean):
    """The merged update by k-means over explicit vectors, following the definition."""
    units = [(part.u[:, i], float(part.s[i]), part.v[i]) for part in parts for i in range(len(part.s))]

    def alike(first, second):
        cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
        value = cosine(first[0], second[0]) * cosine(first[1], second[1])
        return 0.0 if abs(value) < 1e-6 else value

    sides = [(u, v) for u, _, v in units]
    centres = [max(range(len(units)), key=lambda i: units[i][1])]
    while len(centres) < count:
        centres.append(max((i for i in range(len(units)) if i not in centres),
                           key=lambda i: units[i][1] * (1 - max(alike(sides[i], sides[j]) for j in centres))))
    middle, before = [sides[i] for i in centres], None
    for _ in range(10):
        nearest = [max(range(len(middle)), key=lambda j, side=side: alike(side, middle[j])) for side in sides]
        if nearest == before:
            break
        before, means = nearest, []
        for j in range(len(middle)):
            mine = [i for i, at in enumerate(nearest) if at == j]
            medoid = max(mine, key=lambda m, mine=mine: sum(alike(sides[i], sides[m]) for i in mine))
            a, b = torch.zeros_like(sides[0][1]), torch.zeros_like(sides[0][0])
            for i in mine:
                u, s, v = units[i]
                toward = float(u @ sides[medoid][0] + v @ sides[medoid][1])
                sign = -1.0 if toward < -1e-6 else 1.0
                a, b = a + sign * s**0.5 * v / len(mine), b + sign * s**0.5 * u / len(mine)
            length = sum((2 * units[i][1]) ** 0.5 for i in mine) / len(mine)
            means.append((a, b, length / float(torch.cat([a, b]).norm())))
        middle = [(b, a) for a, b, _ in means]
    return (mean / len(means)) ** 0.5 * sum(factor**2 * torch.outer(b, a) for a, b, factor in means)


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_lego_is_its_formula(count):
    for _ in range(5):
        parts = parts_of(4, 3, 2)
        down, up, notes = lego.merged(parts, count, 3.0)
        torch.testing.assert_close(up @ down, explicit(parts, count, 3.0), rtol=0, atol=1e-9)
        assert notes["ranks"] == len(down) <= count


def test_lego_with_every_rank_is_the_sum():
    """As many clusters as rank-ones: the concatenation, times the root of r / k."""
    parts = parts_of(3, 3)
    down, up, _ = lego.merged(parts, 99, 3.0)
    whole = sum(part.u @ torch.diag(part.s) @ part.v for part in parts)
    torch.testing.assert_close(up @ down, whole * math.sqrt(3 / 6), rtol=0, atol=1e-9)


def test_lego_of_twins_is_the_lora(case):
    """Whatever basis the factors were in: each rank-one meets its copy."""
    engine, loras = case
    turn = torch.linalg.qr(drawn(3, 3))[0]
    down, up = drawn(3, 12), drawn(10, 3)
    twins = [singular(down, up), singular(turn @ down * 7, up @ turn.T / 7)]
    merged_down, merged_up, notes = lego.merged(twins, 3, 3.0)
    torch.testing.assert_close(merged_up @ merged_down, up @ down, rtol=0, atol=1e-9)
    assert notes["shared"] == 1.0 and notes["likeness"] == pytest.approx(1.0)
    unread = replace(loras[0], text_weight=0.0)  # text encoders add both up, as with every method of one evaluation
    laws.same(laws.latents(engine, laws.request("lego", unread, unread)), laws.merged(engine, unread), 1e-6)


def test_lego_folds_and_is_the_same_live(case):
    engine, loras = case
    asked, kept = laws.request("lego", *loras, steps=3), engine.fold
    try:
        engine.fold = False
        live = laws.latents(engine, asked)
        engine.fold = True
        laws.same(laws.latents(engine, asked), live, 1e-7)
    finally:
        engine.fold = kept


# depth -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "counts"), [
    ("grows", [1, 2, 2, 3, 3]), ("falls", [3, 3, 2, 2, 1]), ("hourglass", [3, 2, 1, 2, 3]), ("diamond", [1, 2, 3, 2, 1])])
def test_depth_gives_each_block_its_number(shape, counts):
    blocks = [f"double.{i}" for i in range(5)]
    strengths = {block: {0: 1.0, 1: 0.55 + i / 4, 2: 1.47 - i / 4} for i, block in enumerate(blocks)}
    acting = depth.allotted(strengths, blocks, depth.Options(shape=shape))
    assert [len(acting[block]) for block in blocks] == counts
    for block, here in acting.items():
        assert set(here) == set(sorted(strengths[block], key=lambda k, at=strengths[block]: -at[k])[: len(here)])


def test_depth_is_its_formula(case):
    """Against Merge with each LoRA's factor 0 in the blocks where it does not act, chosen by dense updates."""
    engine, loras = case
    asked = laws.request("depth", *loras, steps=3)
    squares, names = {}, asked.names
    with laws.opened(engine, asked) as (run, _, _):
        blocks = depth.blocks_of(run)
        for path, layer in run.adapters.stacks().items():
            for k in range(3):
                if (block := run.backbone.block(path)) and layer.touches(k):
                    dense = layer.delta([float(i == k) for i in range(3)], torch.device("cpu"), torch.float64)
                    squares.setdefault(block, {}).setdefault(k, []).append(float(dense.square().sum()))
    size = {block: {k: (sum(each) / len(each)) ** 0.5 for k, each in mine.items()} for block, mine in squares.items()}
    mean = {k: sum(mine[k] for mine in size.values() if k in mine) / sum(k in mine for mine in size.values()) for k in range(3)}
    silent = {k: {} for k in range(3)}
    for number, block in enumerate(blocks):
        if block in size:
            count = 1 + int(number / (len(blocks) - 1) * 2 + 0.5)
            order = sorted(range(3), key=lambda k, block=block: -size[block].get(k, 0.0) / mean[k])
            for k in order[count:]:
                silent[k][block] = 0.0
    assert any(silent.values())
    kinds = [kind.partition(".")[0] for kind in blocks]
    assert kinds == sorted(kinds, key=depth.ORDER.index)
    result = engine.run(asked)
    blocked = [replace(lora, blocks=silent[k]) for k, lora in enumerate(loras)]
    laws.same(laws.latents(engine, asked), laws.merged(engine, *blocked, steps=3), 1e-7)
    assert {block: [names[k] for k in range(3) if block not in silent[k]] for block in size} == result.notes["depth"]


# K-LoRA ----------------------------------------------------------------------------------------------------------------


def test_k_lora_is_its_formula(case):
    """Each layer's LoRAs at each step, against Merge through `Lora.blocks` being no finer than blocks: the gates themselves are compared."""
    engine, loras = case
    asked = laws.request("k-lora", *loras, steps=4)
    turning = engine.backbone.family == "flux"
    with laws.opened(engine, asked) as (run, times, start):
        run.categories = dict(zip(run.names, CATEGORIES, strict=True))
        dense = {}
        for path, layer in run.adapters.stacks().items():
            of = lambda *weights, layer=layer: layer.delta(weights, torch.device("cpu"), torch.float64)  # noqa: E731
            dense[path] = of(loras[0].weight, 0.0, loras[2].weight), of(0.0, loras[1].weight, 0.0)
        both = {path: (c, s) for path, (c, s) in dense.items() if c.abs().sum() > 0 and s.abs().sum() > 0}
        ratios = [float(c.abs().sum() / s.abs().sum()) for c, s in both.values()]
        bound = 3 * sum(ratios) / len(ratios)
        gamma = sum(r for r in ratios if r <= bound) / sum(r <= bound for r in ratios)
        schedule, changed = k_lora._Schedule(run, k_lora.Options()), set()
        for index in range(4):
            assert schedule.at(Step(index, 4, times[0], start))
            gain = 1.5 * index / 4 + 0.5
            gain = (1.5 * index / 4 + 1.275) % 1.5 if turning else gain
            for path, layer in run.adapters.stacks().items():
                expected = [1.0, 1.0, 1.0]
                if path in both:
                    content, style = both[path]
                    count = sum(b - a for a, b in (layer.spans[0], layer.spans[2])) * (layer.spans[1][1] - layer.spans[1][0])
                    largest = [sum(sorted(side.abs().flatten().tolist())[-count:]) for side in (content, style)]
                    late = not largest[0] / gamma > largest[1] * gain
                    expected = [0.0, 1.0, 0.0] if late else [1.0, 0.0, 1.0]
                    changed.add((path, late))
                gates = schedule.by_layer[path].tolist()
                assert gates == [expected[k] for k, (a, b) in enumerate(layer.spans) for _ in range(a, b)]
        assert len(changed) > len(both)
        notes = run.notes["k-lora"]
        assert notes["style"] == [run.names[1]] and set(notes["style from"]) == set(both)
        if not turning:
            for path, share in notes["style from"].items():
                for index in range(4):
                    schedule.at(Step(index, 4, times[0], start))
                    style_on = bool(schedule.by_layer[path][run.adapters.stacks()[path].spans[1][0]])
                    assert style_on is (index / 4 >= share) or index / 4 == pytest.approx(share, abs=1e-3)


def test_k_lora_without_both_roles_is_merge(case):
    engine, loras = case
    alike = [replace(lora, category="object") for lora in loras]
    result = engine.run(laws.request("k-lora", *alike))
    assert any("category style" in line for line in remarks(result.notes))
    laws.same(laws.latents(engine, laws.request("k-lora", *alike)), laws.merged(engine, *alike))


@pytest.mark.parametrize("law", [laws.order, laws.weight_zero, laws.off_at_a_step, laws.no_leak])
def test_k_lora_with_roles_obeys_the_laws(case, law):
    law(case[0], "k-lora", case[1])
    assert "style from" in case[0].run(laws.request("k-lora", *case[1])).notes["k-lora"]


def test_gamma_leaves_outliers_out():
    assert k_lora.gamma([1.0] * 9 + [91.0]) == 1.0 and k_lora.gamma([]) == 1.0 and k_lora.gamma([float("inf"), 2.0]) == 2.0


# LoRAtorio -------------------------------------------------------------------------------------------------------------


def test_loratorio_weighs_patches_by_their_cosine():
    each, base = drawn(3, 2, 4, 16, 16), drawn(2, 4, 16, 16)
    weights = loratorio.weights(each, base, loratorio.Options(smooth=False))
    for picture in range(2):
        cosine = torch.zeros(3, 8, 8, dtype=torch.float64)
        for k in range(3):
            for i in range(8):
                for j in range(8):
                    a, b = (side[picture, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for side in (each[k], base))
                    cosine[k, i, j] = a @ b / (a.norm() * b.norm())
        power = torch.exp(-(cosine - cosine.mean()) / cosine.std(correction=0))
        expected = (power / power.sum(0)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        torch.testing.assert_close(weights[:, picture, 0], expected, rtol=0, atol=1e-9)
    smooth = loratorio.weights(each, base, loratorio.Options())
    torch.testing.assert_close(smooth.sum(0), torch.ones(2, 1, 16, 16, dtype=torch.float64))
    assert (smooth - weights).abs().max() > 1e-3


def test_loratorio_is_its_formula(case):
    """The prediction from the LoRAs' and the base's own, each through Merge."""
    engine, loras = case
    options = {"recentre": 0.25, "patches": 4, "tau": 0.5}
    asked = laws.request("loratorio", *loras, options=options)
    value = laws.prediction(engine, asked, 1)
    lone = []
    for some in ([], *([lora] for lora in loras)):
        with laws.opened(engine, laws.request("merge", *some)) as (run, times, start):
            lone.append(run.denoise(Step(1, len(times), times[1], start)))
    base, each = lone[0], torch.stack(lone[1:])
    say = loratorio.weights(each[:, 1], base[1], loratorio.Options(**options))
    negative, positive = 0.25 * base[0] + 0.75 * each[:, 0].mean(0), (say * each[:, 1]).sum(0)
    laws.same(value, negative + asked.guidance * (positive - negative))


def test_loratorio_of_one_without_recentring_is_merge(case):
    engine, loras = case
    laws.same(laws.latents(engine, laws.request("loratorio", loras[0], options={"recentre": 0.0})), laws.merged(engine, loras[0]))


# notes, and compiled denoisers -----------------------------------------------------------------------------------------


def test_notes_say_what_each_lora_got(case):
    engine, loras = case
    names = set(laws.request("merge", *loras).names)
    notes = engine.run(laws.request("topk", *loras)).notes["topk"]["share of tokens"]
    assert all(set(block) == names and all(0 <= share <= 1 for share in block.values()) for block in notes.values())
    assert any(0 < share < 1 for block in notes.values() for share in block.values())
    ranks = engine.run(laws.request("ranks", *loras)).notes["ranks"]["ranks a token"]
    assert all(sum(block.values()) <= max(RANKS) + 1 for block in ranks.values())
    assert 0 < engine.run(laws.request("entropy", *loras)).notes["entropy"]["soft"] < 1
    notes = engine.run(laws.request("loratorio", *loras)).notes["loratorio"]["share"]
    assert set(notes) == names and all(sum(step) == pytest.approx(1, abs=1e-3) for step in zip(*notes.values(), strict=True))
    lego_notes = SimpleNamespace(**engine.run(laws.request("lego", *loras)).notes["lego"])
    assert lego_notes.ranks <= lego_notes.of


@pytest.mark.slow
@pytest.mark.parametrize("method", ["topk"])
def test_compiled_is_eager(method, engines, lora_files, shapes_unchecked):
    from tests.composition.test_laws import _compiled

    laws.compiled_is_eager(_compiled("flux"), engines["flux"], method, laws.loras_of(lora_files["flux"]))
