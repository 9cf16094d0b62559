"""A ComfyUI node that gives a SAMPLER for "SamplerCustom": its "euler" ("ddim") or "dpmpp_2m", all steps at once.

Copy this file into ComfyUI/custom_nodes; deqkern must be installed in its environment. Never run inside ComfyUI: only
the function it hands over, `deqkern.integrations.k_diffusion.sample_deq`, is tested. Conditions with a timestep range
look at the first sigma of a batch and do not fit; those with one row per image need batch_size 1. Neither is noticed.
"""

from __future__ import annotations

from typing import Any


def sample(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    *,
    order: int,
    rtol: float,
    max_batch: int,
) -> Any:
    """`sample_deq`, but for masks that ComfyUI holds with one row per sample, which are not repeated for every step."""
    from deqkern.integrations.k_diffusion import sample_deq

    given = extra_args or {}
    if given.get("denoise_mask") is not None and len(x) > 1:
        raise ValueError("a mask needs batch_size 1")
    if "denoise_mask_function" in given.get("model_options", {}):
        raise ValueError("differential diffusion looks at one sigma per batch")
    options = {"order": order, "rtol": rtol, "max_batch": max_batch}
    return sample_deq(model, x, sigmas, extra_args, callback, disable, **options)


ORDERS = {"euler": 1, "dpmpp_2m": 2}


class DeqkernSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        rtol = ("FLOAT", {"default": 0.01, "min": 0.0, "max": 0.5, "step": 0.001, "round": False})
        rows = ("INT", {"default": 64, "min": 1, "max": 4096})
        name = (list(ORDERS), {"default": "euler"})
        return {"required": {"sampler_name": name, "rtol": rtol, "max_batch": rows}}

    def sampler(self, sampler_name: str, rtol: float, max_batch: int) -> tuple[Any]:
        import comfy.samplers

        options = {"order": ORDERS[sampler_name], "rtol": rtol, "max_batch": max_batch}
        return (comfy.samplers.KSAMPLER(sample, options),)


NODE_CLASS_MAPPINGS = {"DeqkernSampler": DeqkernSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"DeqkernSampler": "deqkern: all steps at once"}
