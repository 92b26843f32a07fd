"""The methods written once more, slowly, on stock diffusers and PEFT: what the engine is held to.

Nothing of composition is imported here. Each function returns final latents; each picture has its own generator.
"""

import torch


def load(pipe, files, weights):
    """Load LoRA files the stock way, named l0, l1, ..."""
    for index, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"l{index}")
    names = [f"l{index}" for index in range(len(files))]
    pipe.set_adapters(names, list(weights))
    return names


def stock(pipe, prompt, negative, steps, guidance, generators):
    """The stock pipeline's own call, with whatever adapters are active."""
    return pipe(prompt=[prompt] * len(generators), negative_prompt=[negative] * len(generators) if negative else None,
                num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="latent").images


def _encode(pipe, prompt, negative, sdxl):
    found = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                               negative_prompt=negative or None)
    if not sdxl:
        return torch.cat([found[1], found[0]]), None
    return torch.cat([found[1], found[0]]), torch.cat([found[3], found[2]])


def _predict(pipe, latents, t, text, pooled, guidance):
    scaled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
    extra = None
    if pooled is not None:
        side = latents.shape[-1] * pipe.vae_scale_factor
        ids = torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=latents.dtype)
        extra = {"text_embeds": pooled, "time_ids": ids}
    out = pipe.unet(scaled, t, encoder_hidden_states=text, added_cond_kwargs=extra).sample
    negative, positive = out.chunk(2)
    return negative + guidance * (positive - negative)


@torch.no_grad()
def each(pipe, names, weights, prompt, negative, steps, guidance, generator, combine):
    """One picture; combine(step index, predictor) gives the prediction, predictor(k) LoRA k's alone."""
    sdxl = hasattr(pipe, "text_encoder_2")
    encoded = []
    for name, weight in zip(names, weights, strict=True):
        pipe.set_adapters([name], [weight])
        encoded.append(_encode(pipe, prompt, negative, sdxl))
    pipe.scheduler.set_timesteps(steps)
    side = pipe.unet.config.sample_size
    latents = torch.randn((1, pipe.unet.config.in_channels, side, side), generator=generator, dtype=pipe.unet.dtype)
    latents = latents * pipe.scheduler.init_noise_sigma
    for index, t in enumerate(pipe.scheduler.timesteps):

        def predictor(k, latents=latents, t=t):
            pipe.set_adapters([names[k]], [weights[k]])
            return _predict(pipe, latents, t, *encoded[k], guidance)

        value = combine(index, predictor)
        latents = pipe.scheduler.step(value, t, latents, return_dict=False)[0]
    return latents


def composite(pipe, names, weights, *rest):
    """1/k sum_j eps_j, guided (2402.16843, section 3.2)."""
    return each(pipe, names, weights, *rest, combine=lambda _, p: sum(p(k) for k in range(len(names))) / len(names))


def switch(pipe, names, weights, *rest, tau=5):
    """Live: floor(((t-1) mod (k tau)) / tau) + 1 for t = 1, 2, ... (2402.16843, section 3.1)."""
    k = len(names)
    return each(pipe, names, weights, *rest, combine=lambda i, p: p(int(((i + 1 - 1) % (k * tau)) / tau)))
