# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The licences of known bases, as their cards declare them."""

from typing import NamedTuple

from .text import HUB


class License(NamedTuple):
    """
    A licence.

    Attributes:
        id (`str`):
            What the Hub calls it; `"other"` for one that it has no name for.
        title (`str`):
            What people call it.
        name (`str`), link (`str`):
            Of one that is `"other"`, the name that its card gives it, and where it stands.
    """

    id: str
    title: str
    name: str | None = None
    link: str | None = None


APACHE = License("apache-2.0", "Apache 2.0")
OPEN_RAIL = License("creativeml-openrail-m", "CreativeML OpenRAIL-M")
OPEN_RAIL_PLUS = License("openrail++", "CreativeML OpenRAIL++-M")


def _stability(base: str) -> License:
    link = f"{HUB}/{base}/blob/main/LICENSE.md"
    return License("other", "Stability AI Community License", "stabilityai-ai-community", link)


def _flux_2(base: str) -> License:
    return License("other", "FLUX Non-Commercial License", "flux-non-commercial-license", f"{HUB}/{base}")


def _krea(base: str) -> License:
    link = "https://www.krea.ai/krea-2-licensing"
    return License("other", "Krea 2 Community License", "krea-2-community", link)


def _sana(base: str) -> License:
    return License("other", "NVIDIA's licence for Sana (NSCL v2-custom)", "nscl-v2-custom", f"{HUB}/{base}")


FLUX_DEV = "black-forest-labs/FLUX.1-dev"
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPEN_RAIL,
    "stabilityai/stable-diffusion-xl-base-1.0": OPEN_RAIL_PLUS,
    FLUX_DEV: License(
        *("other", "FLUX.1 [dev] Non-Commercial License", "flux-1-dev-non-commercial-license"),
        f"{HUB}/{FLUX_DEV}/blob/main/LICENSE.md",
    ),
    **dict.fromkeys(
        (
            "black-forest-labs/FLUX.1-schnell",
            *(f"black-forest-labs/FLUX.2-klein-{name}" for name in ("4B", "base-4B")),
            *("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen-Image"),
        ),
        APACHE,
    ),
    **{
        base: make(base)
        for make, bases in (
            (_stability, [f"stabilityai/stable-diffusion-3.5-{size}" for size in ("medium", "large", "large-turbo")]),
            (_flux_2, [f"black-forest-labs/FLUX.2-{name}" for name in ("dev", "klein-9B", "klein-base-9B")]),
            (_krea, ["krea/Krea-2-Raw", "krea/Krea-2-Turbo"]),
            (_sana, [f"Efficient-Large-Model/Sana_{size}_1024px_diffusers" for size in ("600M", "1600M")]),
        )
        for base in bases
    },
}


def license_of(base: str | None) -> License | None:
    """The licence of a base by its Hub id; `None` if it is not known."""
    return LICENSES.get(base) if base else None
