"""How patients are drawn, planted, treated and discharged; on a random base in place of a healthy run."""

import gc
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
from tiny_random import RESOLUTION

from helpers.causes import CAUSES
from helpers.data import coco
from helpers.data.coco import read_split
from helpers.data.masks import segmentation_to_rle
from helpers.detect import detections
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.lab import clinic as clinic_module
from helpers.lab.clinic import (
    WARDS,
    Clinic,
    CureReport,
    VitalSigns,
    check_cause,
    deviations,
    signs_of,
    take_signs,
)
from helpers.lab.faults import FAULTS, HEALTHY, Fault, replaced
from helpers.train.run import read_run

PATCHED = Fault(
    "nothing passes",
    "no box",
    cause="threshold_ignored",
    patch=partial(
        replaced, "detect.detections.detect", lambda original: lambda *args, **kwargs: []
    ),
    trains=False,
)
SPOILED = Fault(
    "no weights",
    "an error",
    cause="adapter_keys",
    spoil_run=lambda run: (run / "adapter_model.safetensors").unlink(),
    trains=False,
)
TRAINED = Fault(
    "half is dropped",
    "low scores",
    cause="extreme_regularisation",
    settings=("lora.dropout=0.5", "scale.num_epochs=0.02"),
)
FAULTS_HERE = {"patched": PATCHED, "spoiled": SPOILED, "trained": TRAINED}


@pytest.fixture(autouse=True)
def wards(monkeypatch):
    monkeypatch.setattr(clinic_module, "FAULTS", FAULTS_HERE)
    monkeypatch.setattr(clinic_module, "WARDS", {name: (name,) for name in FAULTS_HERE})
    monkeypatch.setattr(clinic_module, "EPOCHS", "scale.num_epochs=0.02")


@pytest.fixture(scope="module")
def places(tmp_path_factory, base, data_dir):
    return {
        "folder": tmp_path_factory.mktemp("clinic"),
        "data_dir": data_dir,
        "settings": (
            f"model.name={base}",
            f"model.resolution={RESOLUTION}",
            "data.negative_prompts=[joint, moss, dog, hole]",
            "lora.rank=4",
        ),
    }


@pytest.fixture
def clinic(places):
    with Clinic(**places) as clinic:
        yield clinic


def test_wards_hold_faults_of_the_lab_and_every_patch_has_a_ward():
    for names in WARDS.values():
        assert set(names) <= FAULTS.keys()
        assert len(set(names)) == len(names)
    patched = {name for name, fault in FAULTS.items() if fault.patch}
    assert patched <= set(WARDS["06"])


def test_the_healthy_run_is_made_once_and_anew_for_another_recipe(places, clinic):
    first = clinic.healthy / "metrics.json"
    made = first.stat().st_mtime_ns
    Clinic(**places)
    assert first.stat().st_mtime_ns == made
    Clinic(**places, seed=1)
    assert first.stat().st_mtime_ns > made


def test_a_fault_in_the_code_stays_until_its_own_treatment(clinic):
    right = detections.detect
    patient = clinic.admit("patched", 0)
    assert detections.detect is not right
    patient.treat("weights_not_loaded")
    assert detections.detect is not right
    patient.treat("threshold_ignored")
    assert detections.detect is right
    assert patient.treatments == ["weights_not_loaded", "threshold_ignored"]


def test_signs_come_back_with_the_right_treatment_only(clinic):
    patient = clinic.admit("spoiled", 0)
    assert patient.signs.remark.startswith("raised")
    patient.treat("no_objects")
    assert not clinic.check_cure(patient).cured
    patient.treat("adapter_keys")
    report = clinic.check_cure(patient)
    assert report.cured
    assert report.now == clinic.signs


def test_a_trained_patient_trains_as_long_as_the_healthy_run_which_its_cure_gives(places, clinic):
    steps = read_run(clinic.healthy).metrics["steps"]
    patient = clinic.admit("trained", 0)
    ill = read_run(patient.folder)
    assert ill.config.lora.dropout == 0.5
    assert ill.metrics["steps"] == steps
    patient.treat("extreme_regularisation")
    assert patient.folder == clinic.healthy
    with clinic.planted(HEALTHY, places["folder"] / "again") as folder:
        again = read_run(folder)
    healthy = read_run(clinic.healthy)
    assert (again.config.lora.dropout, again.metrics["steps"]) == (0.1, steps)
    assert again.config.fingerprint() == healthy.config.fingerprint()
    assert again.metrics["valid"] == pytest.approx(healthy.metrics["valid"])


def test_there_is_one_bed(clinic):
    right = detections.detect
    clinic.admit("patched", 0)
    clinic.admit("spoiled", 0)
    assert detections.detect is right
    clinic.admit("patched", 0)
    clinic.discharge()
    assert detections.detect is right


def opened_again(places):
    Clinic(**places).admit("patched", 0)
    return Clinic(**places)


def forgotten(places):
    Clinic(**places).admit("patched", 0)
    gc.collect()


def left_by_an_error(places):
    with pytest.raises(InputError, match="no ward"), Clinic(**places) as clinic:
        [clinic.admit(ward, 0) for ward in ("patched", "nowhere")]


@pytest.mark.parametrize("leave", [opened_again, forgotten, left_by_an_error])
def test_a_clinic_that_is_left_takes_its_fault_along(places, leave):
    right = detections.detect
    leave(places)
    assert detections.detect is right


def test_what_is_imported_while_a_function_is_replaced_gets_it_back(monkeypatch):
    """A module that binds the replacement must not keep it, and none is imported to look into it."""
    late = ModuleType("helpers.late")
    before = set(sys.modules)
    with replaced("data.coco.read_split", lambda original: lambda *args: None) as original:
        assert set(sys.modules) == before
        monkeypatch.setitem(sys.modules, "helpers.late", late)
        late.read_split = coco.read_split  # as by ``from helpers.data.coco import read_split``
        assert late.read_split is not original
    assert late.read_split is coco.read_split is read_split is original


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
    """As on Windows, where a module-level ``import resource`` broke every patched patient."""
    subprocess.run([sys.executable, "-c", WINDOWS], check=True)


def test_the_guess_comes_first(clinic):
    patient = clinic.admit("patched", 0)
    for action in (patient.diagnose, patient.reveal):
        with pytest.raises(InputError, match="comes after your guess"):
            action()
    patient.guess = "no_objects"
    assert "the guess was no_objects" in patient.reveal()
    patient.guess = "threshold_ignored"
    assert patient.reveal().startswith("threshold_ignored, as guessed")


def test_the_diagnosis_runs_with_the_fault_in_place(clinic, monkeypatch):
    calls = []
    monkeypatch.setattr(
        clinic_module, "diagnose", lambda folder: calls.append((folder, detections.detect))
    )
    right = detections.detect
    patient = clinic.admit("patched", 0)
    patient.guess = "no_objects"
    patient.diagnose()
    [(folder, detect)] = calls
    assert folder == patient.folder
    assert detect is not right


def test_the_same_case_draws_the_same_fault(clinic, monkeypatch):
    monkeypatch.setattr(clinic_module, "WARDS", {"all": ("patched", "spoiled")})
    drawn = [clinic.admit("all", case)._fault for case in (0, 1, 2, 0)]
    assert drawn[0] is drawn[-1]
    assert {id(fault) for fault in drawn} == {id(PATCHED), id(SPOILED)}
    assert clinic.suspects("all") == ["adapter_keys", "threshold_ignored"]


@pytest.mark.parametrize(("ward", "case"), [("07", 0), ("patched", -1), ("patched", True)])
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
    monkeypatch.setattr(clinic_module, "WARDS", {"05": ("patched",)})
    patient = clinic.admit("05", 3)
    assert str(patient.folder.relative_to(clinic.folder)) == "patient_05_3/run"


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


def test_shares_are_counted_over_images_and_absent_prompts(run, data_dir):
    """Two of three images show cracks: one is outlined, one answered in a wrong place; moss once."""
    truth = read_split(data_dir, "valid")
    answers = predict_split(run.model, run.processor, truth, absent_prompts=["moss"])
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
    assert signs.false_alarms == pytest.approx(1 / 4)  # moss thrice, crack once
    assert (signs.presence, signs.best_query) == pytest.approx((0.8, 0.7))
    assert signs.remark == ""


def empty_rle(query):
    return segmentation_to_rle([[0, 0, 2, 0, 2, 2, 0, 2]], query.height, query.width)


def test_a_pipeline_that_raises_is_a_sign(run_folder, tmp_path, data_dir):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    truth = read_split(data_dir, "valid")
    with replaced("detect.metrics.evaluate_queries", lambda original: broken):
        signs = take_signs(run_folder, truth)
    assert signs == VitalSigns(remark="raised RuntimeError")
    assert deviations(signs, signs) == {"remark": "raised RuntimeError"}
    assert take_signs(tmp_path, truth).remark == "raised InputError"


def test_a_dataset_without_objects_is_refused(clinic, places, monkeypatch):
    split = clinic._truth
    empty = replace(split, records=tuple(replace(record, objects=()) for record in split.records))
    monkeypatch.setattr(clinic_module, "load_dataset", lambda *args: Dataset(empty))
    with pytest.raises(InputError, match="no image shows an object"):
        Clinic(**places)


class Dataset:
    def __init__(self, split):
        self.split = lambda name: split
