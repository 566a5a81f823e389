# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The models with which several commands look at images: a vision-language model and a detector."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..annotation.detector import Detector
    from ..annotation.vlm import VLM

ORACLE = "oracle"

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # short names of types


@dataclass
class VLMArguments:
    """
    Which vision-language model is used, and how it is run.

    Parameters:
        vlm (`str`, *optional*, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`):
            The vision-language model: a Hub id, a folder, the model's name on the server, or `oracle`.
        vlm_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        vlm_base_url (`str`, *optional*):
            Address of an OpenAI-compatible server with the model. By default the model runs in this process.
        vlm_batch_size (`int`, *optional*, defaults to `8`):
            Requests per batch, for a model in this process.
        vlm_dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights, for a model in this process.
        vlm_max_new_tokens (`int`, *optional*, defaults to `512`):
            Largest length of an answer, in tokens.
        vlm_concurrency (`int`, *optional*, defaults to `32`):
            Requests that the server is sent at the same time.
        vlm_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that the server may take for a request.
        vlm_request (`str`, *optional*):
            JSON with parameters of the server's requests to add or change; `null` leaves one out.
    """

    vlm: str = field(
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        metadata={
            "help": "The vision-language model: a Hub id, a folder, the model's name on the server, or `oracle`, which knows "
            "only the quickstart's worlds."
        },
    )
    vlm_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    vlm_base_url: str | None = field(
        default=None,
        metadata={"help": "Address of an OpenAI-compatible server with the model, such as http://localhost:8000/v1."},
    )
    vlm_batch_size: int = field(default=8, metadata={"help": "Requests per batch, for a model in this process."})
    vlm_dtype: str = field(default="auto", metadata={"help": "Type of the weights, for a model in this process."})
    vlm_max_new_tokens: int = field(default=512, metadata={"help": "Largest length of an answer, in tokens."})
    vlm_concurrency: int = field(default=32, metadata={"help": "Requests that the server is sent at the same time."})
    vlm_timeout: float = field(default=120.0, metadata={"help": "Seconds that the server may take for a request."})
    vlm_request: str | None = field(
        default=None,
        metadata={
            "help": "JSON with parameters of the server's requests to add or change; null leaves one out, as in "
            '\'{"max_tokens": null, "max_completion_tokens": 512, "temperature": null}\'.'
        },
    )

    def __post_init__(self):
        for name in ("vlm_batch_size", "vlm_max_new_tokens", "vlm_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.vlm_timeout < float("inf"):
            raise ValueError(f"`--vlm_timeout` must be a positive number of seconds, got {self.vlm_timeout}.")
        if self.vlm_request is not None and not self.vlm_base_url:
            raise ValueError("`--vlm_request` is for a server: name one with `--vlm_base_url`, or leave it out.")
        if self.vlm_base_url and self.vlm_revision:
            raise ValueError(
                "`--vlm_revision` is for a model in this process: leave it out with `--vlm_base_url`, where the server decides."
            )

    @property
    def request(self) -> dict[str, Any] | None:
        """`vlm_request` as a dictionary."""
        if not isinstance(self.vlm_request, str):  # a YAML file gives a dictionary
            return self.vlm_request
        try:
            return json.loads(self.vlm_request)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--vlm_request` is not valid JSON: {error}.") from error


@dataclass
class DetectorArguments:
    """
    Which detector is used, and how it is run.

    Parameters:
        detector (`str`, *optional*, defaults to `"IDEA-Research/grounding-dino-base"`):
            The zero-shot detector: a Hub id, a folder, or `oracle`.
        detector_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        detector_threshold (`float`, *optional*, defaults to `0.3`):
            Detections with a lower score do not count.
        detector_dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the detector's weights.
        detector_batch_size (`int`, *optional*, defaults to `16`):
            Images per batch of the detector.
    """

    detector: str = field(
        default="IDEA-Research/grounding-dino-base",
        metadata={"help": "The zero-shot detector: a Hub id, a folder, or `oracle`."},
    )
    detector_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    detector_threshold: float = field(default=0.3, metadata={"help": "Detections with a lower score do not count."})
    detector_dtype: str = field(default="float32", metadata={"help": "Type of the detector's weights."})
    detector_batch_size: int = field(default=16, metadata={"help": "Images per batch of the detector."})


def get_vlm(args: VLMArguments) -> "VLM":
    """
    Loads the vision-language model that the flags name.

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
            request=args.request,
        )
    from ..annotation.transformers_vlm import TransformersVLM

    return TransformersVLM(
        args.vlm,
        revision=args.vlm_revision,
        batch_size=args.vlm_batch_size,
        max_new_tokens=args.vlm_max_new_tokens,
        dtype=DTYPES.get(args.vlm_dtype, args.vlm_dtype),
    )


def get_detector(args: DetectorArguments) -> "Detector":
    """
    Loads the detector that the flags name.

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
        dtype=DTYPES.get(args.detector_dtype, args.detector_dtype),
    )
