"""The methods written once more, slowly, on stock diffusers and PEFT: what the engine is held to.

Nothing of composition is imported here. Each function returns final latents; each picture has its own generator.
"""

import numpy as np
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def load(pipe, files, weights):
    """Load LoRA files the stock way, named l0, l1, ..."""
    for index, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"l{index}")
    names = [f"l{index}" for index in range(len(files))]
    pipe.set_adapters(names, list(weights))
    return names


def packed(latents):
    """(B, C, H, W) as FLUX packs them, by diffusers' own function."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(latents, pipe, side):
    """FLUX's packed latents of a picture of so many pixels a side as (B, C, H, W), by diffusers' own function."""
    return FluxPipeline._unpack_latents(latents, side, side, pipe.vae_scale_factor)


def stock(pipe, prompt, negative, steps, guidance, generators, side=32):
    """The stock pipeline's own call for a square of so many pixels a side, with whatever adapters are active."""
    if isinstance(pipe, FluxPipeline):
        distilled = pipe.transformer.config.guidance_embeds
        told = {"guidance_scale": guidance} if distilled else {"true_cfg_scale": guidance, "negative_prompt": [negative] * len(generators)}
        out = pipe(prompt=[prompt] * len(generators), num_inference_steps=steps, generator=generators, output_type="latent", height=side,
                   width=side, max_sequence_length=pipe.tokenizer_2.model_max_length, **told).images
        return unpacked(out, pipe, side)
    return pipe(prompt=[prompt] * len(generators), negative_prompt=[negative] * len(generators) if negative else None,
                num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="latent", height=side, width=side).images


def _encode(pipe, prompt, negative):
    """Everything the denoiser reads besides latents and time, the negative's first."""
    if isinstance(pipe, FluxPipeline):
        read = [pipe.encode_prompt(words, None, device="cpu", max_sequence_length=pipe.tokenizer_2.model_max_length)[:2]
                for words in ([prompt] if pipe.transformer.config.guidance_embeds else [negative, prompt])]
        return [torch.cat(values) for values in zip(*read, strict=True)]
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": negative or None}
    if isinstance(pipe, StableDiffusion3Pipeline):
        found = pipe.encode_prompt(prompt, None, None, **call)
    else:
        found = pipe.encode_prompt(prompt, **call)
    return [torch.cat([found[i + 1], found[i]]) for i in range(0, len(found), 2)]


def _predict(pipe, latents, t, read, guidance):
    if isinstance(pipe, FluxPipeline):
        config, side = pipe.transformer.config, latents.shape[-1] // 2
        rows = len(read[0])
        told = torch.full((rows,), guidance) if config.guidance_embeds else None
        ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", latents.dtype)
        out = pipe.transformer(packed(torch.cat([latents] * rows)), read[0], read[1], t.to(latents.dtype).expand(rows) / 1000, ids,
                               torch.zeros(read[0].shape[1], 3, dtype=latents.dtype), guidance=told).sample
        out = unpacked(out, pipe, latents.shape[-1] * pipe.vae_scale_factor)
        return out if rows == 1 else out[:1] + guidance * (out[1:] - out[:1])
    if isinstance(pipe, StableDiffusion3Pipeline):
        out = pipe.transformer(torch.cat([latents] * 2), read[0], read[1], t.expand(2)).sample
    else:
        scaled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        extra = None
        if len(read) == 2:
            side = latents.shape[-1] * pipe.vae_scale_factor
            extra = {"text_embeds": read[1], "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=latents.dtype)}
        out = pipe.unet(scaled, t, encoder_hidden_states=read[0], added_cond_kwargs=extra).sample
    negative, positive = out.chunk(2)
    return negative + guidance * (positive - negative)


def _begin(pipe, steps, generator, side):
    """First latents, of a picture of so many pixels a side, and the scheduler's times."""
    places = side // pipe.vae_scale_factor
    if isinstance(pipe, FluxPipeline):
        config = pipe.scheduler.config
        mu = calculate_shift((places // 2) ** 2, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return torch.randn((1, 4, places, places), generator=generator, dtype=pipe.transformer.dtype)
    pipe.scheduler.set_timesteps(steps)
    if isinstance(pipe, StableDiffusion3Pipeline):
        return torch.randn((1, 4, places, places), generator=generator, dtype=pipe.transformer.dtype)
    latents = torch.randn((1, pipe.unet.config.in_channels, places, places), generator=generator, dtype=pipe.unet.dtype)
    return latents * pipe.scheduler.init_noise_sigma


@torch.no_grad()
def each(pipe, names, weights, prompt, negative, steps, guidance, generator, combine, side=32):
    """One picture; combine(step index, predictor) gives the prediction, predictor(k) LoRA k's alone."""
    encoded = []
    for name, weight in zip(names, weights, strict=True):
        pipe.set_adapters([name], [weight])
        encoded.append(_encode(pipe, prompt, negative))
    latents = _begin(pipe, steps, generator, side)
    for index, t in enumerate(pipe.scheduler.timesteps):

        def predictor(k, latents=latents, t=t):
            pipe.set_adapters([names[k]], [weights[k]])
            return _predict(pipe, latents, t, encoded[k], guidance)

        value = combine(index, predictor)
        latents = pipe.scheduler.step(value, t, latents, return_dict=False)[0]
    return latents


def composite(pipe, names, weights, *rest, side=32):
    """1/k sum_j eps_j, guided (2402.16843, section 3.2)."""
    return each(pipe, names, weights, *rest, side=side, combine=lambda _, p: sum(p(k) for k in range(len(names))) / len(names))


def switch(pipe, names, weights, *rest, tau=5, side=32):
    """Live: floor(((t-1) mod (k tau)) / tau) + 1 for t = 1, 2, ... (2402.16843, section 3.1)."""
    k = len(names)
    return each(pipe, names, weights, *rest, side=side, combine=lambda i, p: p(int(((i + 1 - 1) % (k * tau)) / tau)))


def psnr(a, b):
    """dB between two pictures of 8 bits."""
    error = np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
