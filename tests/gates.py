"""Gates with random parameters, for toys: none are bundled with them."""

import torch


def drawn_gates(run, kind="rank", seed=0, **design):
    """Gates with random parameters for every layer of the run's denoiser."""
    from composition.methods.shared import gating

    layers = {path: module for path, module in run.backbone.denoiser.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    widths = {path: getattr(module, "out_features", None) or module.out_channels for path, module in layers.items()}
    gates = gating.Gating(gating.Design(kind, run.request.model, widths, **{"film": kind == "rank"} | design))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in gates.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    return gates.requires_grad_(False)
