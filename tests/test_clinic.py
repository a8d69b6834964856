"""How patients are drawn, planted, treated and cured; on a random base in place of a healthy run."""

import json
import re
import subprocess
import sys
from copy import copy
from dataclasses import replace

import pytest

from helpers.causes import CAUSES
from helpers.data.coco import read_split
from helpers.data.masks import segmentation_to_rle
from helpers.errors import InputError
from helpers.lab.faults import FAULTS
from notebooks import clinic as clinic_module
from notebooks.clinic import (
    WARDS,
    Clinic,
    CureReport,
    VitalSigns,
    check_cause,
    deviations,
    queries_of,
    signs_of,
    take_signs,
)
from notebooks.score import ANSWER_READ, CURED, SCORE_FILE, Score

WARDS_HERE = {
    name: (name,) for name in ("threshold fixed", "keys with prefix", "dropout of a half")
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, base, data_dir):
    settings = {"rank": 4, "base": str(base), "epochs": 1}
    return {"folder": tmp_path_factory.mktemp("clinic"), "data_dir": data_dir, **settings}


@pytest.fixture(scope="module")
def shared(places):
    return Clinic(**places)


@pytest.fixture
def clinic(shared, monkeypatch):
    monkeypatch.setattr(clinic_module, "WARDS", WARDS_HERE)
    return shared


def test_wards_hold_faults_of_the_lab_whose_causes_can_be_treated():
    for names in WARDS.values():
        assert set(names) <= FAULTS.keys()
        assert len(set(names)) == len(names)
        assert {FAULTS[name].cause for name in names} <= set(CAUSES)


def test_the_healthy_run_is_made_once_and_anew_for_another_recipe(places, shared):
    first = shared.healthy / "adapter_model.safetensors"
    made = first.stat().st_mtime_ns
    again = Clinic(**places)
    assert first.stat().st_mtime_ns == made
    assert again.signs == shared.signs
    assert take_signs(again.script, shared._truth) == shared.signs
    other = Clinic(**places | {"folder": places["folder"] / "other"}, seed=1)
    assert other.healthy != shared.healthy
    assert other._recipe["seed"] == 1


def test_signs_come_back_with_the_right_treatment_only(clinic):
    patient = clinic.admit("threshold fixed", 0)
    assert patient.script.mistakes == {"threshold fixed"}
    assert patient.signs.found == 0 < clinic.signs.best_query
    patient.treat("weights_not_loaded")
    assert clinic.check_cure(patient).now == patient.signs
    patient.treat("threshold_ignored")
    assert clinic.check_cure(patient).now == clinic.signs
    assert patient.treatments == ["weights_not_loaded", "threshold_ignored"]


def test_a_trained_patient_trains_as_long_as_the_healthy_run(clinic):
    patient = clinic.admit("dropout of a half", 0)
    assert patient.script.recipe.dropout == 0.5
    assert len(patient.script.log) == len(clinic.script.log)
    patient.treat("extreme_regularisation")
    assert patient.script is clinic.script


def test_the_guess_comes_first(clinic):
    patient = clinic.admit("threshold fixed", 0)
    for action in (patient.diagnose, patient.reveal):
        with pytest.raises(InputError, match="comes after your guess"):
            action()
    patient.guess = "no_objects"
    assert "the guess was no_objects" in patient.reveal()
    patient.guess = "threshold_ignored"
    assert patient.reveal().startswith("threshold_ignored, as guessed")


def test_the_diagnosis_is_asked_about_the_script_as_it_stands(clinic, monkeypatch):
    monkeypatch.setattr(clinic_module, "diagnose", lambda live: live)
    patient = clinic.admit("threshold fixed", 0)
    patient.guess = "no_objects"
    live = patient.diagnose()
    assert live.model is patient.script.model
    assert live.detect == patient.script.detect


def test_the_same_case_draws_the_same_fault(clinic, monkeypatch):
    names = ("threshold fixed", "keys with prefix")
    monkeypatch.setattr(clinic_module, "WARDS", {"all": names})
    drawn = [clinic.admit("all", case)._fault.name for case in (0, 1, 2)]
    assert drawn[0] == drawn[2]
    assert set(drawn) == set(names)
    assert clinic.suspects("all") == ["adapter_keys", "threshold_ignored"]


@pytest.mark.parametrize(
    ("ward", "case"), [("07", 0), ("threshold fixed", -1), ("threshold fixed", True)]
)
def test_an_impossible_ward_or_case_is_refused(clinic, ward, case):
    with pytest.raises(InputError, match="ward|case"):
        clinic.admit(ward, case)


def test_causes_are_checked():
    assert check_cause("no_objects", "guess") == "no_objects"
    with pytest.raises(InputError, match="'no_object' is no cause.*did you mean 'no_objects'"):
        check_cause("no_object", "guess")
    with pytest.raises(InputError, match="the guess is still"):
        check_cause(..., "guess")
    with pytest.raises(InputError, match="is no cause"):
        check_cause(None, "guess")
    for code in CAUSES:
        assert check_cause(code, "treatment") == code


def test_names_of_files_do_not_give_the_fault_away(clinic, monkeypatch):
    monkeypatch.setattr(clinic_module, "WARDS", {"05": ("threshold fixed",)})
    clinic.admit("05", 3)
    assert (clinic.folder / "patient_05_3" / "run").is_dir()


HEALTHY_SIGNS = VitalSigns(found=1.0, outlined=0.8, false_alarms=0.0, AP50=0.6)


@pytest.mark.parametrize(
    ("signs", "text"),
    [
        (VitalSigns(0.89, 0.8, 0.0, 0.6), "found is 0.89, at least 0.90"),
        (VitalSigns(1.0, 0.69, 0.0, 0.6), "outlined is 0.69, at least 0.70"),
        (VitalSigns(1.0, 0.8, 0.11, 0.6), "false_alarms is 0.11, at most 0.10"),
        (VitalSigns(1.0, 0.8, 0.0, 0.44), "AP50 is 0.44, at least 0.45"),
        (VitalSigns(1.0, 0.8, 0.0, 0.6, remark="raised ValueError"), "raised ValueError"),
    ],
)
def test_each_sign_beyond_its_margin_is_named(signs, text):
    [message] = deviations(signs, HEALTHY_SIGNS).values()
    assert message.startswith(text)


def test_as_healthy_or_better_is_no_deviation():
    assert deviations(HEALTHY_SIGNS, HEALTHY_SIGNS) == {}
    assert deviations(VitalSigns(1.0, 1.0, 0.0, 0.9), HEALTHY_SIGNS) == {}


def test_the_report_says_whether_detections_came_back():
    ill = VitalSigns(found=0.2)
    still = CureReport(HEALTHY_SIGNS, ill, ill)
    assert not still.cured
    assert still.sentence.startswith("Still ill: found is 0.20, at least 0.90 is healthy; outlined")
    back = CureReport(HEALTHY_SIGNS, ill, HEALTHY_SIGNS)
    assert back.cured
    assert back.sentence == (
        "Cured: every sign is healthy again (found 0.20 to 1.00, outlined 0.00 to 0.80, AP50 0.00 to 0.60)."
    )
    assert list(back.table.index) == ["healthy run", "on admission", "now"]
    assert list(back.table["found"]) == [1.0, 0.2, 1.0]


def test_shares_are_counted_over_images_and_absent_prompts(shared, data_dir):
    """Two of three images show cracks: one is outlined, one answered in a wrong place; moss once."""
    truth = read_split(data_dir, "valid")
    answers = queries_of(shared.script, truth)
    shown = [query for query in answers if query.is_positive]
    changed = []
    for query in answers:
        rles = []
        if query is shown[0]:
            rles = query.gt
        elif query is shown[1] or (query.prompt, query.image_id) == ("moss", shown[0].image_id):
            rles = [empty_rle(query)]
        pred = [{"score": 0.9, "rle": dict(rle)} for rle in rles]
        changed.append(replace(query, pred=pred, presence_prob=0.8, max_query_prob=0.7))
    signs = signs_of(changed)
    assert signs.found == 1.0
    assert signs.outlined == 0.5
    absent = [query for query in answers if not query.is_positive]
    assert signs.false_alarms == pytest.approx(1 / len(absent))
    assert (signs.presence, signs.best_query) == pytest.approx((0.8, 0.7))
    assert signs.remark == ""


def empty_rle(query):
    return segmentation_to_rle([[0, 0, 2, 0, 2, 2, 0, 2]], query.height, query.width)


def test_a_script_that_raises_is_a_sign(shared, data_dir):
    truth = read_split(data_dir, "valid")
    broken = copy(shared.script)
    broken.answer = None
    signs = take_signs(broken, truth)
    text = "raised TypeError: 'NoneType' object is not callable"
    assert signs == VitalSigns(remark=text)
    assert deviations(signs, signs) == {"remark": text}


def test_a_dataset_without_objects_is_refused(places, data_copy, tmp_path):
    for path in data_copy.rglob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(InputError, match="no image shows an object"):
        Clinic(**places | {"folder": tmp_path, "data_dir": data_copy})


def test_cures_are_scored_by_the_attempts_they_took(tmp_path):
    score = Score(tmp_path)
    assert score.sentence.startswith("Your score: 0 patients treated, 0 cured at the first attempt")
    score.note("01/0", treatment="no_objects")
    score.note("01/0", outcome=CURED)
    score.note("01/0", treatment="at_clamp")  # after the cure: counts no more
    score.note("02/7", treatment="at_clamp")
    score.note("02/7", treatment="at_clamp")  # the same cell again
    score.note("02/7", treatment="no_objects")
    score.note("02/7", outcome=CURED)
    score.note("06/1", treatment="no_objects")
    assert Score(tmp_path).sentence == (
        "Your score: 3 patients treated, 1 cured at the first attempt, 1 cured later, 1 not cured."
    )
    assert score.table.to_dict("list") == {
        "exercise": ["01", "02", "06"],
        "case": ["0", "7", "1"],
        "treatments": [1, 2, 1],
        "outcome": [CURED, CURED, "not cured yet"],
    }
    score.note("06/1", outcome=ANSWER_READ)
    score.note("06/1", treatment="at_clamp", outcome=CURED)
    assert score.counts()["not cured"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"01/0": ', "no complete JSON"),
        ("[]", "without keys"),
        ('{"01/0": 3}', "'01/0' is no patient's score"),
        ('{"01/0": {"treatments": 1, "outcome": null}}', "'01/0' is no"),
        ('{"01/0": {"treatments": [], "outcome": "great"}}', "'01/0' is no"),
    ],
)
def test_a_damaged_score_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / SCORE_FILE).write_text(content)
    with pytest.raises(InputError, match=message) as refusal:
        Score(tmp_path)
    assert "\n" not in str(refusal.value)
    assert "begins anew" in str(refusal.value)
    assert (tmp_path / SCORE_FILE).read_text() == content


def test_the_clinic_scores_what_it_measured(clinic, monkeypatch, tmp_path):
    monkeypatch.setattr(clinic, "score", Score(tmp_path))
    patient = clinic.admit("threshold fixed", 0)
    assert clinic.score.counts()["treated"] == 0, "admission is no treatment"
    monkeypatch.setattr(clinic_module, "deviations", lambda now, healthy: {})
    clinic.check_cure(patient)
    assert clinic.score.patients == {}, "nobody treated this patient"
    patient.treat("no_objects")
    monkeypatch.setattr(clinic_module, "deviations", lambda now, healthy: {"found": "too few"})
    clinic.check_cure(patient)
    assert clinic.score.counts()["not cured"] == 1
    patient.treat("threshold_ignored")
    monkeypatch.setattr(clinic_module, "deviations", lambda now, healthy: {})
    clinic.check_cure(patient)
    patient.guess = "threshold_ignored"
    answer = patient.reveal()
    assert "1 patient treated, 0 cured at the first attempt, 1 cured later, 0 not cured." in answer
    assert re.search(r"threshold fixed +0 +2 +cured", answer)


def test_a_patient_whose_answer_was_read_is_not_cured_by_it(clinic, monkeypatch, tmp_path):
    monkeypatch.setattr(clinic, "score", Score(tmp_path))
    monkeypatch.setattr(clinic_module, "deviations", lambda now, healthy: {})
    patient = clinic.admit("threshold fixed", 0)
    patient.guess = "no_objects"
    assert "1 not cured" in patient.reveal()
    patient.treat("threshold_ignored")
    clinic.check_cure(patient)
    assert clinic.score.patients["threshold fixed/0"]["outcome"] == ANSWER_READ


WINDOWS = """
import builtins, importlib, os, pkgutil, signal, sys
import helpers

def import_all():
    for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

import_all()  # what other packages import is theirs
for name in [name for name in sys.modules if name.startswith("helpers.")]:
    del sys.modules[name]
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
real = builtins.__import__

def on_windows(name, scope=None, *args, **kwargs):
    if name.split(".")[0] in POSIX and str((scope or {}).get("__name__")).startswith("helpers"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, scope, *args, **kwargs)

builtins.__import__ = on_windows
for owner, names in ((os, ("fork", "geteuid", "getuid", "killpg", "setsid", "nice")),
                     (signal, ("SIGKILL", "SIGALRM", "SIGHUP"))):
    for name in names:
        delattr(owner, name)
import_all()
"""


def test_every_module_is_imported_where_there_is_no_posix():
    """As on Windows, where there is no module ``resource``."""
    subprocess.run([sys.executable, "-c", WINDOWS], check=True)
