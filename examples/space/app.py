# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Space: aligned models beside their base, the data that they learned from, and their trainings. See README.md."""

import os

import gradio as gr
from data_views import (
    Paintings,
    Pairs,
    branch_picture,
    children,
    describe,
    load_paintings,
    load_pairs,
    paintings_with,
    pair_pictures,
    pair_thumbnails,
    shown_large,
    verdicts,
)
from painter import Painter, side_by_side
from PIL import Image
from training_views import curves, load_training, sample, summary
from worlds import Settings, read_settings
from zero_gpu import on_gpu


INTRODUCTION = """# Preference alignment of diffusion models, looked at

All images of a row start from **the same noise**, so what differs between them is what the training changed. Made with
`trl_diffusion`."""
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto !important}
#pairs .thumbnail-lg {aspect-ratio: 2 !important}
.caption-label {left: 4px !important; right: 4px !important; bottom: 4px !important; max-width: none !important;
    padding: 0 4px !important; font-size: 11px !important; white-space: normal !important; text-align: center}
"""
SANS = ["system-ui", "sans-serif"]
THEME = gr.themes.Soft(primary_hue="emerald", neutral_hue="slate", font=SANS, font_mono=SANS).set(
    block_title_background_fill="none",
    block_title_text_color="*neutral_600",
    block_title_padding="0px",
    block_label_background_fill="white",
    block_label_text_color="*neutral_700",
)
LEGEND = """A **green** box agrees with the label of the pair, an **orange** one contradicts it, a **grey** one is a tie. With masks, dark
cells weigh less in the loss, and in red cells the preference is reversed."""


def build(settings: Settings) -> gr.Blocks:
    """
    Builds the interface, with all models and data loaded.

    Args:
        settings ([`Settings`]):
            What is shown.

    Returns:
        [`~gradio.Blocks`]
    """
    painters = {world.title: Painter(world) for world in settings.worlds}
    with gr.Blocks(title="trl_diffusion: aligned models side by side") as demo:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Generate"):
            generate_tab(demo, painters)
        with gr.Tab("Look at the data"):
            gr.Markdown("### Pairs and the verdicts on their instances")
            pairs_view(load_pairs(settings.pairs))
            gr.Markdown("### The tree of attributes, and paintings that have them")
            tree_view(load_paintings(settings.paintings, settings.criteria))
        with gr.Tab("Look at a training"):
            training_tab(settings.trainings)
    return demo


def generate_tab(demo: gr.Blocks, painters: dict[str, Painter]) -> None:
    """Base and aligned models side by side."""
    titles = list(painters)
    first = painters[titles[0]]
    num_images = max(len(painter.titles) for painter in painters.values())

    @on_gpu
    def draw(title: str, prompt: str, seed: float, scale: float, npo: bool) -> list:
        painter = painters[title]
        npo = npo and painter.world.reversed_lora is not None
        drawn = side_by_side(painter, prompt, int(seed), scale, npo)
        shown = [
            gr.Image(shown_large(image), label=name, visible=True)
            for image, name in zip(drawn, painter.titles, strict=True)
        ]
        return shown + [gr.Image(visible=False)] * (num_images - len(shown))

    def enter(title: str) -> tuple:
        world = painters[title].world
        samples = [[prompt] for prompt in world.prompts]
        return world.prompts[0], gr.Dataset(samples=samples), gr.Checkbox(visible=world.reversed_lora is not None)

    world = gr.Radio(titles, value=titles[0], label="Models", visible=len(titles) > 1, elem_id="world")
    with gr.Row():
        prompt = gr.Textbox(first.world.prompts[0], label="Prompt", scale=4, elem_id="prompt")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=1, elem_id="seed")
        button = gr.Button("Generate", variant="primary", scale=1, elem_id="generate")
    prompts = gr.Dataset(
        components=[prompt],
        samples=[[prompt] for prompt in first.world.prompts],
        label="Prompts to click",
        elem_id="prompts",
    )
    with gr.Row():
        images = [
            gr.Image(
                label=first.titles[number] if number < len(first.titles) else "",
                visible=number < len(first.titles),
                format="png",
                interactive=False,
                buttons=["download"],
                elem_id=f"image-{number}",
            )
            for number in range(num_images)
        ]
    with gr.Row():
        scale = gr.Slider(
            0, 1.5, value=1.0, step=0.25, label="Strength of the LoRA", info="0 is the base", elem_id="scale"
        )
        npo = gr.Checkbox(
            label="Negative preference guidance (NPO)",
            info="Guidance also leads away from a LoRA that was trained with the preference reversed",
            visible=first.world.reversed_lora is not None,
            elem_id="npo",
        )

    inputs = [world, prompt, seed, scale, npo]
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "models", "show_progress": "minimal"}
    world.input(enter, world, [prompt, prompts, npo], show_progress="hidden").then(
        draw, inputs, images, **one_at_a_time
    )
    prompts.click(lambda sample: sample[0], prompts, prompt, show_progress="hidden").then(
        draw, inputs, images, **one_at_a_time
    )
    gr.on(
        [demo.load, button.click, prompt.submit, seed.submit, scale.release, npo.input],
        draw,
        inputs,
        images,
        **one_at_a_time,
    )


def pairs_view(pairs: Pairs) -> None:
    """Pairs with boxes, verdicts and masks."""
    modes = {"Images": "images", "Boxes": "boxes", "Masks": "masks"}

    def show(index: int, mode: str, w_neg: float, overlap: str) -> tuple:
        row = pairs.rows[index]
        chosen, rejected = pair_pictures(pairs, index, modes[mode], w_neg, overlap)
        return f"**{row['prompt']}**", chosen, rejected, verdicts(row, w_neg)

    def select(event: gr.SelectData) -> int:
        return event.index

    opened = gr.State(0)
    with gr.Row():
        with gr.Column(scale=2):
            gr.Markdown("Click a pair to open it. Chosen is on the left.")
            thumbnails = gr.Gallery(
                pair_thumbnails(pairs),
                show_label=False,
                columns=2,
                object_fit="contain",
                height=700,
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="pairs",
            )
        with gr.Column(scale=3):
            mode = gr.Radio(list(modes), value="Boxes", label="Draw over the images", elem_id="pair-mode")
            with gr.Row():
                w_neg = gr.Slider(-1, 1, value=0, step=0.25, label="w_neg", info="weight of a contradicting instance")
                overlap = gr.Radio(["mean", "covering"], value="mean", label="mask_overlap")
            start = show(0, "Boxes", 0, "mean")
            title = gr.Markdown(start[0], elem_id="pair-title")
            with gr.Row():
                chosen = gr.Image(
                    start[1], label="Chosen", format="png", interactive=False, buttons=[], elem_id="chosen"
                )
                rejected = gr.Image(
                    start[2], label="Rejected", format="png", interactive=False, buttons=[], elem_id="rejected"
                )
            table = gr.Dataframe(
                start[3],
                headers=["instance", "verdict", "label of the pair", "weight"],
                column_widths=["26%", "36%", "22%", "16%"],
                interactive=False,
                buttons=[],
                wrap=True,
                elem_id="verdicts",
            )
            gr.Markdown(LEGEND)
    inputs, outputs = [opened, mode, w_neg, overlap], [title, chosen, rejected, table]
    thumbnails.select(select, None, opened, show_progress="hidden")
    gr.on([opened.change, mode.input, w_neg.release, overlap.input], show, inputs, outputs, show_progress="hidden")


def tree_view(paintings: Paintings) -> None:
    """A walk through the tree; at each place the attributes below, and the paintings that have them."""
    criteria = paintings.criteria

    def show(path: tuple[str, ...]) -> tuple:
        return (
            path,
            describe(criteria, path),
            gr.Radio(children(criteria, path), value=None, visible=bool(children(criteria, path))),
            gr.Button(interactive=bool(path)),
            branch_picture(criteria, path),
            paintings_with(paintings, path, "positive"),
            paintings_with(paintings, path, "negative"),
        )

    place = gr.State(())
    with gr.Row():
        with gr.Column(scale=2):
            where = gr.Markdown(describe(criteria, ()), elem_id="place")
            down = gr.Radio(children(criteria, ()), label="Go down to", elem_id="down")
            up = gr.Button("Go up", size="sm", interactive=False, elem_id="up")
            picture = gr.Image(
                branch_picture(criteria, ()),
                show_label=False,
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="branch",
            )
        with gr.Column(scale=3):
            galleries = [paintings_gallery(paintings, form) for form in ("positive", "negative")]
    outputs = [place, where, down, up, picture, *galleries]
    down.input(lambda path, child: show((*path, child)), [place, down], outputs, show_progress="hidden")
    up.click(lambda path: show(tuple(path[:-1])), place, outputs, show_progress="hidden")


def paintings_gallery(paintings: Paintings, form: str) -> gr.Gallery:
    gr.Markdown(f"Paintings with a **{form}** form")
    return gr.Gallery(
        paintings_with(paintings, (), form),
        show_label=False,
        columns=4,
        rows=2,
        height=330,
        object_fit="contain",
        interactive=False,
        buttons=[],
        elem_id=f"{form}-paintings",
    )


def training_tab(trainings: dict[str, str]) -> None:
    """Curves, and samples by step."""
    titles = list(trainings)

    def show(title: str) -> tuple:
        training = load_training(trainings[title])
        last = len(training.samples)
        return (
            curves(training),
            summary(training),
            gr.Slider(maximum=max(last, 2), value=last, visible=last > 1),
            gr.Image(sample(training, last), visible=last > 0),
        )

    def turn(title: str, number: float) -> Image.Image | None:
        return sample(load_training(trainings[title]), int(number))

    start = load_training(trainings[titles[0]])
    last = len(start.samples)
    chosen = gr.Dropdown(titles, value=titles[0], label="Training", elem_id="training")
    with gr.Row():
        with gr.Column(scale=3):
            picture = gr.Image(
                curves(start),
                show_label=False,
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="curves",
            )
            table = gr.Dataframe(
                summary(start),
                headers=["metric", "first", "last"],
                interactive=False,
                buttons=[],
                elem_id="summary",
            )
        with gr.Column(scale=2):
            number = gr.Slider(
                1,
                max(last, 2),
                value=last,
                step=1,
                label="Samples",
                info="from the first step to the last",
                visible=last > 1,
                elem_id="step",
            )
            shown = gr.Image(
                sample(start, last),
                show_label=False,
                format="png",
                interactive=False,
                visible=last > 0,
                buttons=["fullscreen"],
                elem_id="samples",
            )
    chosen.input(show, chosen, [picture, table, number, shown], show_progress="hidden")
    number.change(turn, [chosen, number], shown, show_progress="hidden")


if __name__ == "__main__":
    build(read_settings(os.environ)).launch(theme=THEME, css=CSS, footer_links=[], show_error=True)
