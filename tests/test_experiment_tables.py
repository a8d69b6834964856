import numpy as np
import pandas as pd
import pytest

from data.experiments import make_photographs
from data.experiments.cells import (
    BASES,
    DATA_DIR,
    DESIGNS,
    FACTORS,
    RESPONSES,
    SUSPECTS,
    TABLES,
    cells_of,
    one_step_states,
    usages_of,
)
from data.experiments.statistics import (
    SHARES,
    effect_table,
    effects_figure,
    levels_figure,
    steps_table,
)
from data.experiments.tables import (
    DECISIVE,
    free_places,
    front_figure,
    grades_figure,
    load_base_row,
    load_table,
    runs_of_states,
    tables_folder,
    undominated,
)
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.records import absent_candidates
from helpers.errors import InputError
from helpers.files import CONFIGS, ROOT, WALL_CRACKS


@pytest.fixture(scope="module")
def made_up():
    """A complete table in which text LoRA adds 0.5 and nothing else changes anything."""
    rows = []
    for cell in cells_of("schedule"):
        value = 0.1 * cell.seed + 0.5 * (cell.factors["text_lora"] == "on")
        row = cell.factors | {"seed": cell.seed} | dict.fromkeys(RESPONSES, value)
        rows.append(row | {"config_hash": cell.config("tiny", DATA_DIR).fingerprint()})
    return pd.DataFrame(rows)


def write(table, folder):
    table.to_csv(folder / "schedule.csv", index=False)
    return folder


def test_a_complete_table_is_read_as_it_is(made_up, tmp_path):
    table = load_table("schedule", write(made_up, tmp_path))
    pd.testing.assert_frame_equal(table, made_up)
    effects = effect_table(table, FACTORS["schedule"], "AP50")["value"]
    assert effects.tolist() == pytest.approx([0, 0.5, 0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.iloc[1:], "19 rows are not the 20 runs"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "21 rows are not the 20 runs"),
        (lambda table: table.assign(seed=table["seed"] + 1), "20 rows are not the 20 runs"),
        (lambda table: table.assign(AP50=float("nan")), "a response is missing"),
        (lambda table: table.assign(config_hash="0" * 12), "other configurations"),
    ],
)
def test_what_is_not_the_design_is_refused(made_up, tmp_path, spoil, message):
    with pytest.raises(InputError, match=message):
        load_table("schedule", write(spoil(made_up), tmp_path))


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="make experiment"):
        load_table("schedule", tmp_path)
    with pytest.raises(InputError, match="make experiment"):
        load_base_row(tmp_path)


def test_the_folder_is_found_from_the_notebooks(monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    assert tables_folder("../data/experiments") == ROOT / "data" / "experiments"
    with pytest.raises(InputError, match="is no folder"):
        tables_folder("nowhere")


@pytest.mark.parametrize("design", list(DESIGNS))
def test_the_committed_tables_are_whole_and_of_this_code(design):
    table = load_table(design)
    assert len(table) == len(usages_of(design))
    assert not table["code_version"].str.endswith("-dirty").any()
    assert table[list(RESPONSES)].min(axis=None) >= -1
    assert table[list(RESPONSES)].max(axis=None) <= 1


def test_the_committed_base_row_has_every_response():
    for word in BASES:
        assert set(load_base_row(TABLES, word).index) == set(RESPONSES)


def test_shares_count_the_images_and_absent_prompts_of_the_test_split():
    split = read_split(WALL_CRACKS, "test")
    absent = load_config(CONFIGS / "crack_detection_config.yaml", "tiny").evaluation.absent_prompts
    nouns = [*split.categories, *absent]
    counts = {
        "detected_share": sum(bool(record.objects) for record in split.records),
        "false_positive_rate": sum(len(absent_candidates(r, nouns)) for r in split.records),
    }
    assert counts == SHARES
    for design in DESIGNS:
        table = load_table(design)
        for outcome, count in SHARES.items():
            successes = table[outcome] * count
            assert (successes - successes.round()).abs().max() < 1e-3


@pytest.mark.parametrize("word", list(BASES))
def test_intervals_of_shares_stay_within_what_is_possible_and_have_a_width(word):
    table = load_table("causes", word=word)
    assert set(table["word"]) == {word}
    for outcome in SHARES:
        steps = steps_table(table, SUSPECTS, outcome)
        assert steps[["low", "high"]].abs().max(axis=None) <= 1
        difference = steps["after"] - steps["before"]
        assert (steps["low"] <= difference + 1e-12).all()  # equal where all is won or lost
        assert (difference - 1e-12 <= steps["high"]).all()
        assert (steps["low"] < steps["high"]).all()


def test_no_recipe_beats_those_on_the_front():
    means = pd.DataFrame(
        {"kept": [0.1, 0.5, 0.5, 0.9], "AP50": [0.9, 0.8, 0.7, 0.1]}, index=[*"abcd"]
    )
    assert undominated(means).index.tolist() == ["a", "b", "d"]
    table = load_table("front")
    figure = front_figure(table)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["never met the word", "half knows the word"]
    listed = figure.axes[2].texts[0].get_text().splitlines()
    assert len(listed) == table["recipe"].nunique()


def test_figures_show_every_effect_and_every_run(made_up):
    figure = effects_figure(made_up, FACTORS["schedule"], ["AP50", "cgF1"])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["schedule", "text lora", "schedule x text lora"]
    assert len(figure.axes) == 2

    figure = levels_figure(made_up, "schedule", ["AP50"], base=made_up[list(RESPONSES)].iloc[0])
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [10, 10]


def test_a_set_of_photographs_is_judged_once(tmp_path, monkeypatch):
    judged = []

    def judge(folder, word, recipe, seed):
        judged.append((recipe, seed))
        values = ("set", word, recipe, seed, 1.0, 0.5)
        return [dict(zip([*make_photographs.KEYS, "detected_share", "AP50"], values, strict=True))]

    monkeypatch.setattr(make_photographs, "judge_recipe", judge)
    arguments = [str(tmp_path / "set"), "--output", str(tmp_path / "table.csv")]
    assert make_photographs.main(arguments) == 0
    assert make_photographs.main([*arguments, "--seeds", "1", "2"]) == 0
    recipes = make_photographs.RECIPES
    assert sorted(judged) == sorted((recipe, seed) for recipe in recipes for seed in (1, 2))
    assert len(pd.read_csv(tmp_path / "table.csv")) == len(judged)


def test_a_label_lies_beside_its_point_and_far_from_others():
    points = np.array([[0.5, 0.5], [0.5, 0.51], [0.52, 0.5], [0.1, 0.9]])
    places = free_places(points)
    assert np.linalg.norm(places - points, axis=1).max() < 0.1
    taken = np.concatenate([points, places])
    gaps = np.linalg.norm(places[:, None] - taken, axis=2)
    assert np.sort(gaps, axis=1)[:, 1].min() > 0.03  # beside itself


def test_runs_in_states_are_found_and_drawn_over_what_the_base_knows():
    rows = [
        {"word": word, **state, "seed": seed, "detected_share": seed / 10}
        for word in ("never", "half")
        for state in one_step_states()
        for seed in (1, 2)
    ]
    runs = runs_of_states(pd.DataFrame(rows))
    assert runs.groupby(["word", "state"]).size().tolist() == [2] * 2 * len(DECISIVE)
    figure = grades_figure(pd.DataFrame(rows), {"never": 0.0, "half": 0.6})
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(DECISIVE)
