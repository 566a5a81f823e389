# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What cards say of the methods of this library, by the name of the trainer, and what they cite."""

from typing import Any, NamedTuple


class MethodText(NamedTuple):
    """
    What a card says of a method besides its name and paper.

    Attributes:
        script (`str`):
            The command that trains with it.
        description (`str`):
            Two sentences.
        arm (`str`):
            The training that tells what the method itself adds.
        builds_on (`tuple[str, ...]`):
            Names of the papers that it builds on, among [`cards.methods.CITATIONS`].
    """

    script: str
    description: str
    arm: str | None = None
    builds_on: tuple[str, ...] = ()


MASK = "Where an instance, such as a dog or a hand, is drawn better in the image that lost, a mask takes its region out of the comparison."
METHODS = {
    "InstanceDPOTrainer": MethodText(
        "instance-dpo",
        "As in Diffusion-DPO, the model learns from two images of one prompt to make the one that was preferred likelier than the "
        f"other, measured from the model before the training. {MASK}",
        "the same training with `w_neg` 1, which is Diffusion-DPO",
        ("Diffusion-DPO",),
    ),
    "AttributeSFTTrainer": MethodText(
        "attribute-sft",
        "The model is fine-tuned on images whose prompts name their attributes, good and bad ones alike, so that it draws what a prompt "
        "asks for. It is the expert that teaches another model in the second stage, and draws badly where a prompt names bad attributes.",
    ),
    "ComplexPOTrainer": MethodText(
        "complex-po",
        "A frozen expert knows how the good and the bad attributes of a tree of criteria look. From the prompt alone, the model learns to "
        "predict what the expert predicts with the good attributes, and not what it predicts with the bad ones.",
        "supervised fine-tuning on the same images",
        ("Diffusion-DPO",),
    ),
    "DDSPOTrainer": MethodText(
        "ddspo",
        "The model learns from two images of one prompt, as in Diffusion-DPO, but from its own predictions in the place of the noise. On "
        "the image that was preferred it stays at what it predicted before the training, and on the other it moves away from what it "
        "predicted for the prompt without some of its words.",
        "the same training with Diffusion-DPO",
        ("Diffusion-DPO",),
    ),
    "DiffusionKTOTrainer": MethodText(
        "diffusion-kto",
        "The model learns from single images, each labelled as desirable or undesirable. Measured from the model before the training and "
        "from the mean of all images, it makes desirable images likelier and undesirable ones less likely.",
        "supervised fine-tuning on the desirable images",
        ("Diffusion-DPO",),
    ),
}
# What replaces the description of CPO where there was no expert, by `target_prompts`
WITHOUT_EXPERT = {
    "attributes": "There was no expert. From the prompt alone, the model learns to predict what it predicted before the training for the "
    "prompt with the good attributes of a tree of criteria, and not what it predicted with the bad ones.",
    "degraded": "There was neither an expert nor were there attributes. The model learns to move away from what it predicted before the "
    "training for the prompt without some of its words, and is held where it was for the whole prompt.",
}
# What replaces the description of IAPO where `loss_type` is `"mapo"`
WITHOUT_REFERENCE = (
    "The model learns from two images of one prompt to denoise the preferred one well, and better than the other. The model before the "
    f"training plays no part in it. {MASK}"
)
NO_MASK = "With `w_neg` 1, as here, no region is taken out"
PLAIN_DPO = f"{NO_MASK}: this is Diffusion-DPO."
GROUPED = "Here each instance is compared by itself, with its own preference, and so is the background."
# The losses of pairs besides that of Diffusion-DPO, and the names of their papers among `CITATIONS`
PAIR_LOSSES = {"ipo": "IPO", "hinge": "SLiC", "mapo": "MaPO", "dspo": "DSPO", "dmpo": "DMPO"}
SAFEGUARD = "Diffusion-SDPO"
DEGRADED = "DDSPO"  # the paper of the degraded prompts
SWAPPED = "Here the two are swapped, so that it learns to draw what it should not."
SWAPPED_LABELS = "Here the labels are swapped, so that it learns to draw what it should not."
REVERSED = "Diffusion-NPO"

CITATIONS = {
    "DDSPO": """\
@article{kim2025ddspo,
    title  = {{Direct Diffusion Score Preference Optimization via Stepwise Contrastive Policy-Pair Supervision}},
    author = {Kim, Dohyun and Lyu, Seungwoo and Kim, Seung Wook and Seo, Paul Hongsuck},
    year   = {2025},
    eprint = {arXiv:2512.23426},
}""",
    "IPO": """\
@inproceedings{azar2024general,
    title     = {{A General Theoretical Paradigm to Understand Learning from Human Preferences}},
    author    = {Azar, Mohammad Gheshlaghi and Guo, Zhaohan Daniel and Piot, Bilal and Munos, Remi and Rowland, Mark and
                 Valko, Michal and Calandriello, Daniele},
    booktitle = {AISTATS},
    year      = {2024},
    eprint    = {arXiv:2310.12036},
}""",
    "SLiC": """\
@article{zhao2023slic,
    title  = {{SLiC-HF: Sequence Likelihood Calibration with Human Feedback}},
    author = {Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and Liu, Peter J.},
    year   = {2023},
    eprint = {arXiv:2305.10425},
}""",
    "MaPO": """\
@article{hong2024margin,
    title  = {{Margin-aware Preference Optimization for Aligning Diffusion Models without Reference}},
    author = {Hong, Jiwoo and Paul, Sayak and Lee, Noah and Rasul, Kashif and Thorne, James and Jeong, Jongheon},
    year   = {2024},
    eprint = {arXiv:2406.06424},
}""",
    "DSPO": """\
@inproceedings{zhu2025dspo,
    title     = {{DSPO: Direct Score Preference Optimization for Diffusion Model Alignment}},
    author    = {Zhu, Huaisheng and Xiao, Teng and Honavar, Vasant G},
    booktitle = {ICLR},
    year      = {2025},
}""",
    "DMPO": """\
@article{li2025divergence,
    title  = {{Divergence Minimization Preference Optimization for Diffusion Model Alignment}},
    author = {Li, Binxu and Xu, Minkai and Han, Jiaqi and Dang, Meihua and Ermon, Stefano},
    year   = {2025},
    eprint = {arXiv:2507.07510},
}""",
    "Diffusion-SDPO": """\
@article{fu2025diffusion,
    title  = {{Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models}},
    author = {Fu, Minghao and Wang, Guo-Hua and Cui, Tianyu and Chen, Qing-Guo and Xu, Zhao and Luo, Weihua and Zhang, Kaifu},
    year   = {2025},
    eprint = {arXiv:2511.03317},
}""",
    "Diffusion-DPO": """\
@inproceedings{wallace2024diffusion,
    title     = {{Diffusion Model Alignment Using Direct Preference Optimization}},
    author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam, Senthil and
                 Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
    booktitle = {CVPR},
    year      = {2024},
    eprint    = {arXiv:2311.12908},
}""",
    "Diffusion-NPO": """\
@inproceedings{wang2025diffusion,
    title     = {{Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion Models}},
    author    = {Wang, Fu-Yun and Shui, Yunhao and Piao, Jingtan and Sun, Keqiang and Li, Hongsheng},
    booktitle = {ICLR},
    year      = {2025},
    eprint    = {arXiv:2505.11245},
}""",
    "trl_diffusion": """\
@software{trl_diffusion,
    title   = {{trl\\_diffusion}},
    author  = {{The trl\\_diffusion authors}},
    license = {Apache-2.0},
    year    = {2026},
}""",
    "TRL": """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
               Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020},
}""",
    "diffusers": """\
@software{vonplaten2022diffusers,
    title   = {{Diffusers: State-of-the-art diffusion models}},
    author  = {von Platen, Patrick and Patil, Suraj and Lozhkov, Anton and Cuenca, Pedro and Lambert, Nathan and Rasul, Kashif and
               Davaadorj, Mishig and Nair, Dhruv and Paul, Sayak and Berman, William and Xu, Yiyi and Liu, Steven and Wolf, Thomas},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/diffusers},
    year    = {2022},
}""",
}


def citations_of(trainer: str, citation: str, is_reversed: bool, hyperparameters: dict[str, Any]) -> list[str]:
    """
    What a card cites.

    Args:
        trainer (`str`):
            The class of the trainer.
        citation (`str`):
            The method's own paper, as BibTeX; may be empty.
        is_reversed (`bool`):
            Whether the preference was reversed.
        hyperparameters (`dict[str, Any]`):
            Of which `loss_type`, `safeguard_mu` and `target_prompts` are read.

    Returns:
        `list[str]`: entries of BibTeX, the method's own first.
    """
    builds_on = METHODS[trainer].builds_on if trainer in METHODS else ()
    if trainer == "InstanceDPOTrainer":
        loss = PAIR_LOSSES.get(hyperparameters.get("loss_type"))
        is_safeguarded = hyperparameters.get("safeguard_mu") is not None
        builds_on = *builds_on, *([loss] if loss else []), *([SAFEGUARD] if is_safeguarded else [])
    if trainer == "ComplexPOTrainer" and hyperparameters.get("target_prompts") == "degraded":
        builds_on = *builds_on, DEGRADED
    names = *builds_on, *([REVERSED] if is_reversed else []), "trl_diffusion", "TRL", "diffusers"
    return [*([citation] if citation else []), *(CITATIONS[name] for name in names)]
