# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The models that look at images for several commands: a vision-language model and a detector."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..annotation.detector import Detector
    from ..annotation.vlm import VLM

ORACLE = "oracle"


@dataclass
class VLMArguments:
    """
    Which vision-language model answers, and how it is run.

    Parameters:
        vlm (`str`, *optional*, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`):
            The vision-language model: a Hub id, a folder, a name on the server, or `oracle`.
        vlm_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        vlm_base_url (`str`, *optional*):
            An OpenAI-compatible server that offers the model; left out, it runs in this process.
        vlm_batch_size (`int`, *optional*, defaults to `8`):
            Requests that the model in this process answers at once.
        vlm_dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights in this process.
        vlm_max_new_tokens (`int`, *optional*, defaults to `512`):
            An answer's longest length in tokens.
        vlm_concurrency (`int`, *optional*, defaults to `32`):
            Requests that are under way to the server at once.
        vlm_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that the server may take for one.
    """

    vlm: str = field(
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        metadata={
            "help": "The vision-language model: a Hub id, a folder, a name on the server, or `oracle`, which knows the "
            "quickstart's worlds."
        },
    )
    vlm_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    vlm_base_url: str | None = field(
        default=None,
        metadata={"help": "An OpenAI-compatible server that offers the model, such as http://localhost:8000/v1."},
    )
    vlm_batch_size: int = field(default=8, metadata={"help": "Requests answered at once, in this process."})
    vlm_dtype: str = field(default="auto", metadata={"help": "Type of the weights, in this process."})
    vlm_max_new_tokens: int = field(default=512, metadata={"help": "An answer's longest length in tokens."})
    vlm_concurrency: int = field(default=32, metadata={"help": "Requests under way at once, to the server."})
    vlm_timeout: float = field(default=120.0, metadata={"help": "Seconds that the server may take for a request."})

    def __post_init__(self):
        for name in ("vlm_batch_size", "vlm_max_new_tokens", "vlm_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.vlm_base_url and self.vlm_revision:
            raise ValueError("`--vlm_revision` is for a model in this process; the server decides on its own.")


@dataclass
class DetectorArguments:
    """
    Which detector looks for things.

    Parameters:
        detector (`str`, *optional*, defaults to `"IDEA-Research/grounding-dino-base"`):
            The zero-shot detector: a Hub id, a folder, or `oracle`.
        detector_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        detector_threshold (`float`, *optional*, defaults to `0.3`):
            Hits with a lower score do not count.
        detector_dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the detector's weights.
        detector_batch_size (`int`, *optional*, defaults to `16`):
            Images that the detector looks at at once.
    """

    detector: str = field(
        default="IDEA-Research/grounding-dino-base",
        metadata={"help": "The zero-shot detector: a Hub id, a folder, or `oracle`."},
    )
    detector_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    detector_threshold: float = field(default=0.3, metadata={"help": "Hits with a lower score do not count."})
    detector_dtype: str = field(default="float32", metadata={"help": "Type of the detector's weights."})
    detector_batch_size: int = field(default=16, metadata={"help": "Images that the detector looks at at once."})


def get_vlm(args: VLMArguments) -> "VLM":
    """
    The vision-language model that the flags name.

    Args:
        args ([`VLMArguments`]):
            The flags.

    Returns:
        [`VLM`]

    Raises:
        `ValueError`: If there is no such model.
    """
    if args.vlm == ORACLE:
        from ..quickstart.oracle import OracleVLM

        return OracleVLM()
    if args.vlm_base_url:
        from ..annotation.endpoint_vlm import EndpointVLM

        return EndpointVLM(
            args.vlm_base_url,
            args.vlm,
            concurrency=args.vlm_concurrency,
            timeout=args.vlm_timeout,
            max_new_tokens=args.vlm_max_new_tokens,
        )
    from ..annotation.transformers_vlm import TransformersVLM

    return TransformersVLM(
        args.vlm,
        revision=args.vlm_revision,
        batch_size=args.vlm_batch_size,
        max_new_tokens=args.vlm_max_new_tokens,
        dtype=args.vlm_dtype,
    )


def get_detector(args: DetectorArguments) -> "Detector":
    """
    The detector that the flags name.

    Args:
        args ([`DetectorArguments`]):
            The flags.

    Returns:
        [`Detector`]

    Raises:
        `ValueError`: If there is no such model.
    """
    if args.detector == ORACLE:
        from ..quickstart.oracle import OracleDetector

        return OracleDetector()
    from ..annotation.detector import TransformersDetector

    return TransformersDetector(
        args.detector,
        revision=args.detector_revision,
        threshold=args.detector_threshold,
        batch_size=args.detector_batch_size,
        dtype=args.detector_dtype,
    )
