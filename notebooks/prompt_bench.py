"""The prompt bench: ask any word of a run and of its base, and see which answers to what."""

import html
import sys
import textwrap
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.data.dataset import PromptCollator
from helpers.data.images import open_upright
from helpers.data.records import plain_prompt, true_objects
from helpers.detect.detections import detect, reaches
from helpers.detect.mistakes import content_matrix
from helpers.detect.predictor import Predictor, check_prompts, untrained_prompts
from helpers.detect.queries import MAX_DETECTIONS, SCORE_FLOOR, query_of
from helpers.errors import InputError, check_probability, printable
from helpers.files import progress_bar
from helpers.show.page import data_uri
from helpers.show.pictures import TRUTH_COLOUR, annotate, decode_mask
from notebooks.gallery import figure_picture, small_figure
from notebooks.still import StillBox

MODELS = ("this run", "its base")
NOTHING = "nothing listed"  # row of a `content_matrix` for pictures without any known word
MESSAGE_LETTERS = 400  # of an error that a panel shows: it quotes what was typed
COLUMNS = ("presence", "best query", "highest score", "detections")
_WIDE = {"style": {"description_width": "initial"}}
_WIDE |= {"layout": {"width": "32em", "max_width": "100%"}}


class PromptBench:
    """Answers of a run and of its base to any word; each is computed once per image and word.

    Parameters
    ----------
    model : peft.PeftModel
        A run; its base is the model with the adapter switched off.
    processor : transformers.Sam3Processor
    split : helpers.data.Split
        The pictures to ask about.
    asked : dict, optional
        What the training asked, ``prompts`` of the run: a remark says so of each word.
    score_threshold : float
        In [0, 1], from which a detection counts.
    """

    def __init__(self, model, processor, split, *, asked=None, score_threshold=0.3):
        if not hasattr(model, "disable_adapter"):
            raise InputError("a base has no adapter to compare it with", fix="load a run")
        if not split.records:
            raise InputError("there is no picture to ask about", where=split.root)
        check_probability(score_threshold, "score_threshold")
        self.split, self.score_threshold, self.asked = split, score_threshold, asked
        self.records = {record.image_id: record for record in split.records}
        self._predictor, self._processor = Predictor(model, processor), processor
        self._tokenize, self._answers = PromptCollator(processor).tokenize, {}

    def words(self, words):
        """Return words as they are asked; `InputError` for one that is empty, too long or no text."""
        plain = [plain_prompt(word) for word in check_prompts(words)]
        bare = int(self._tokenize([""])["attention_mask"].sum())
        for word, mask in zip(plain, self._tokenize(plain)["attention_mask"], strict=True):
            if int(mask.sum()) == bare:
                message = f"the tokenizer makes no token of {word!r}"
                raise InputError(message, fix="type a noun such as 'crack'")
        return plain

    def ask(self, image_id, words):
        """Return ``{"this run": [Query, ...], "its base": [Query, ...]}``, a query per word."""
        words = self.words(words)
        if image_id not in self.records:
            message = f"there is no image {image_id!r}"
            raise InputError(message, where=self.split.root, fix="name an image_id of the split")
        record = self.records[image_id]
        missing = [w for w in dict.fromkeys(words) if (image_id, w) not in self._answers]
        if missing:
            picture = open_upright(record.path)
            answers = [self._predictor.raw(picture, missing, name=image_id)]
            with self._predictor.model.disable_adapter():
                answers.append(self._predictor.raw(picture, missing, name=image_id))
            for word, *raws in zip(missing, *answers, strict=True):
                self._answers[image_id, word] = [self._query(raw, record) for raw in raws]
        same = [self._answers[image_id, word] for word in words]
        return dict(zip(MODELS, map(list, zip(*same, strict=True)), strict=True))

    def _query(self, raw, record):
        own = [o for o in true_objects(record) if plain_prompt(o.category) == raw.prompt]
        found = detect(raw, SCORE_FLOOR, max_detections=MAX_DETECTIONS)
        return query_of(raw, found, record, own)

    def table(self, image_id, words):
        """Set the answers about one image below one another.

        Returns
        -------
        pandas.DataFrame
            A row per word and model; ``presence``, ``best query``, ``highest score`` in [0, 1], and
            the number of ``detections`` from the threshold on.
        """
        answers = self.ask(image_id, words)
        rows = {
            (query.prompt, name): self._row(query)
            for same in zip(*answers.values(), strict=True)
            for name, query in zip(MODELS, same, strict=True)
        }
        index = pd.MultiIndex.from_tuples(rows, names=["asked", "model"])
        return pd.DataFrame(list(rows.values()), index=index, columns=list(COLUMNS))

    def _row(self, query):
        count = int(reaches(query.scores, self.score_threshold).sum())
        return query.presence_prob, query.max_query_prob, query.max_score, count

    def contents(self):
        """Map ``image_id`` to the words in the picture, annotated or only listed, as a set."""
        return {
            image_id: {plain_prompt(w) for w in record.contents}
            | {plain_prompt(item.category) for item in record.objects}
            for image_id, record in self.records.items()
        }

    def matrices(self, words):
        """Ask some words on every picture, and see which are answered to which content.

        Parameters
        ----------
        words : sequence of str

        Returns
        -------
        dict of str to pandas.DataFrame
            Model to its `helpers.detect.content_matrix`: the share of the pictures with the row's
            word on which the column's word is detected. Rows and columns begin with `words`.
        """
        words, queries = self.words(words), {name: [] for name in MODELS}
        with progress_bar(len(self.records), "asking", disable=not sys.stderr.isatty()) as bar:
            for image_id in self.records:
                for name, answers in self.ask(image_id, words).items():
                    queries[name] += answers
                bar.update()
        tables, contents = {}, self.contents()
        for name, answers in queries.items():
            table = content_matrix(answers, self.score_threshold, contents)
            others = sorted(set(table.index) - {*words, NOTHING})
            rows = [row for row in [*words, *others, NOTHING] if row in table.index]
            tables[name] = table.reindex(index=rows, columns=words)
        return tables

    def remark(self, word):
        """Say into which pieces a word falls, and what the training made of it."""
        (word,) = self.words([word])
        pieces = self._processor.tokenizer.tokenize(word)
        text = " + ".join(piece.removesuffix("</w>") for piece in pieces)
        text = f"“{printable(word)}” is read as {len(pieces)} piece{'s'[: len(pieces) > 1]}: {text}"
        if self.asked is None:
            return f"{text}."
        present, absent = (
            [plain_prompt(name) for name in self.asked[key]] for key in ("prompts", "negatives")
        )
        if word in present:
            return f"{text}. The training asked it on pictures that show it."
        if word in absent:
            return f"{text}. The training asked it only where it is absent."
        (closest,) = untrained_prompts([word], [*present, *absent]).values()
        hint = f"; the closest that it asked is “{closest}”" if closest else ""
        return f"{text}. The training never asked it{hint}."

    def figure(self, image_id, word):
        """Draw the annotation, and what the run and its base detect for a word."""
        record, answers = self.records[image_id], self.ask(image_id, [word])
        size = (record.width, record.height)
        objects = true_objects(record)
        fits = [o for o in objects if o.rle is not None and list(o.rle["size"]) == [*size[::-1]]]
        masks = [decode_mask(o.rle, size, image_id) for o in fits] if fits == objects else None
        truth = [o.box_xyxy for o in objects]
        picture = open_upright(record.path)
        names = sorted({o.category for o in objects})
        also = sorted(set(record.contents) - set(names))
        caption = f"annotated: {', '.join(names) or 'nothing'}"
        caption += f"; also in it: {', '.join(also)}" if also else ""
        panels = [(annotate(picture, truth, masks, colour=TRUTH_COLOUR), caption)]
        for name, (query,) in answers.items():
            kept = [d for d in query.pred if reaches(d["score"], self.score_threshold)]
            masks = [decode_mask(d["rle"], size, image_id) for d in kept]
            labels = [f"{d['score']:.2f}" for d in kept[:8]]
            drawn = annotate(picture, [d["box_xyxy"] for d in kept], masks or None, labels)
            caption = f"{name}, “{query.prompt}”: {len(kept)} detected at "
            caption += f"{self.score_threshold:g}, highest score {query.max_score:.3f}"
            panels.append((drawn, caption))
        return small_figure(panels, columns=3, side_inches=2.6)

    def panel(self, word, image_id=None):
        """Make a panel that asks a typed word on a chosen picture.

        Parameters
        ----------
        word : str
            Asked first.
        image_id : str, optional
            Shown first; by default the first of the split.

        Returns
        -------
        types.SimpleNamespace
            ``image``, ``word``, ``readout``, ``picture`` and ``widget``, which is to be displayed. A
            word that cannot be asked is answered by a message in ``readout``.
        """
        panel = SimpleNamespace(readout=widgets.HTML(), picture=widgets.HTML())
        first = next(iter(self.records)) if image_id is None else image_id
        look = {"continuous_update": False, **_WIDE}
        choice = {"options": list(self.records), "value": first}
        panel.image = widgets.SelectionSlider(**choice, description="picture", **look)
        hint = {"placeholder": "a noun, then Enter"}
        panel.word = widgets.Text(value=word, description="asked word", **hint, **look)
        panel.widget = StillBox(panel.word, panel.image, panel.readout, panel.picture)

        def draw(_change=None):
            panel.readout.value = f"asking “{html.escape(printable(panel.word.value))}” …"
            try:
                readout, picture, alt = self._view(panel.image.value, panel.word.value)
            except Exception as error:
                message = html.escape(textwrap.shorten(printable(error), MESSAGE_LETTERS))
                panel.readout.value = f'<p role="alert"><b>Not asked:</b> {message}</p>'
                panel.picture.value = ""
                if not isinstance(error, InputError):
                    raise
                return
            panel.readout.value, panel.widget.still = readout, (picture, alt)
            look = 'style="width:58em;max-width:100%"'
            alt = html.escape(alt, quote=True)
            panel.picture.value = f'<img alt="{alt}" {look} src="{data_uri(picture)}">'

        panel.image.observe(draw, names="value")
        panel.word.observe(draw, names="value")
        draw()
        return panel

    def _view(self, image_id, word):
        """Return what a panel shows: the numbers as HTML, the picture, and a sentence for it."""
        (word,) = self.words([word])
        numbers = self.table(image_id, [word]).droplevel("asked").rename_axis(None)
        figures = {name: "{:.3f}".format for name in COLUMNS[:-1]}
        table = numbers.to_html(formatters=figures, border=0)
        shown = " and ".join(f"{name} {count:d}" for name, count in numbers["detections"].items())
        alt = f"{image_id}, asked for {printable(word)}: detections of {shown}."
        readout = f"{table}<p>{html.escape(self.remark(word))}</p>"
        return readout, figure_picture(self.figure(image_id, word)), alt


def matrix_figure(matrices):
    """Draw what is asked against what is in the picture, a heat map per model.

    Right answers are framed. Every other number is a share of false ones, and a dash stands where
    no picture has the one without the other.

    Parameters
    ----------
    matrices : dict of str to pandas.DataFrame
        Model to shares in [0, 1], from `PromptBench.matrices`.
    """
    shape = next(iter(matrices.values())).shape
    size = (1.6 + len(matrices) * (0.55 * shape[1] + 0.4), 1.5 + 0.36 * shape[0])
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for ax, (name, table) in zip(axes, matrices.items(), strict=True):
        values = table.to_numpy(dtype=float)
        heat = ax.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, column in np.ndindex(values.shape):
            share = values[row, column]
            text, dark = ("–", False) if np.isnan(share) else (f"{share:.2f}", share > 0.6)
            look = {"ha": "center", "va": "center", "fontsize": 9}
            ax.text(column, row, text, color="white" if dark else "black", **look)
            if table.index[row] == table.columns[column]:
                corner = (column - 0.47, row - 0.45)
                ax.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, linewidth=2))
        ax.set_xticks(range(len(table.columns)), table.columns, rotation=45, ha="right")
        ax.set_yticks(range(len(table.index)), table.index)
        ax.set(title=name, xlabel="asked")
    axes[0].set_ylabel("in the picture")
    figure.colorbar(heat, ax=axes, label="share of the pictures where it is detected")
    return figure


def matrix_sentence(matrices):
    """Say of each model which words it detects where they are, and what else it takes the first for."""
    parts = []
    for name, table in matrices.items():
        right = [word for word in table.columns if word in table.index]
        listed = ", ".join(f"{word} {table.loc[word, word]:.2f}" for word in right)
        part = f"{name} detects where it is: {listed or 'no word that is in a picture'}"
        if right:
            first = right[0]
            others = table.loc[first].drop(first).dropna()
            listed = ", ".join(f"{word} {share:.2f}" for word, share in others[others > 0].items())
            part += (
                f"; on pictures with {first} it also detects, asked for it: {listed or 'nothing'}"
            )
        parts.append(part[0].upper() + part[1:])
    return ". ".join(parts) + "."
