"""How patients are drawn, planted, treated and discharged; on a random base in place of a healthy run."""

from contextlib import contextmanager

import pytest
from tiny_random import RESOLUTION, save_tiny_base, write_dataset

from helpers.causes import CAUSES
from helpers.detect import detections
from helpers.errors import InputError
from helpers.lab import clinic as clinic_module
from helpers.lab.clinic import WARDS, Clinic, check_cause
from helpers.lab.faults import FAULTS
from helpers.lab.planting import Fault, replaced
from helpers.train.run import read_run


@contextmanager
def nothing_detected():
    with replaced("detect.detections.detect", lambda *args, **kwargs: []):
        yield


def lose_the_weights(run):
    (run / "adapter_model.safetensors").unlink()


PATCHED = Fault(
    "threshold_ignored", "nothing passes", "no box", patch=nothing_detected, trains=False
)
SPOILED = Fault("adapter_keys", "no weights", "an error", spoil_run=lose_the_weights, trains=False)
TRAINED = Fault(
    "extreme_regularisation",
    "half is dropped",
    "low scores",
    settings=("lora.dropout=0.5", "scale.num_epochs=0.02"),
)
FAULTS_HERE = {"patched": PATCHED, "spoiled": SPOILED, "trained": TRAINED}


@pytest.fixture(autouse=True)
def wards(monkeypatch):
    monkeypatch.setattr(clinic_module, "FAULTS", FAULTS_HERE)
    monkeypatch.setattr(clinic_module, "WARDS", {name: (name,) for name in FAULTS_HERE})
    yield
    clinic_module._BED.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    return {
        "folder": folder / "clinic",
        "data_dir": write_dataset(folder / "bars"),
        "settings": (
            f"model.name={save_tiny_base(folder / 'base')}",
            f"model.resolution={RESOLUTION}",
            "data.negative_prompts=[joint, moss, dog, hole]",
            "lora.rank=4",
        ),
    }


@pytest.fixture
def clinic(places):
    return Clinic(**places)


def test_wards_hold_faults_of_the_laboratory():
    for names in WARDS.values():
        assert set(names) <= FAULTS.keys()
        assert len(set(names)) == len(names)


def test_the_healthy_run_is_made_once_and_anew_for_another_recipe(places, tmp_path):
    places = places | {"folder": tmp_path}
    first = Clinic(**places).healthy / "metrics.json"
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


def test_a_trained_patient_trains_as_long_as_the_healthy_run_and_is_trained_again(clinic):
    steps = read_run(clinic.healthy).metrics["steps"]
    patient = clinic.admit("trained", 0)
    ill = read_run(patient.folder)
    assert ill.config.lora.dropout == 0.5
    assert ill.metrics["steps"] == steps
    patient.treat("extreme_regularisation")
    mended = read_run(patient.folder)
    assert mended.folder != ill.folder
    assert mended.config.lora.dropout == 0.1
    assert mended.metrics["valid"] == pytest.approx(read_run(clinic.healthy).metrics["valid"])


def test_there_is_one_bed(clinic):
    right = detections.detect
    clinic.admit("patched", 0)
    clinic.admit("spoiled", 0)
    assert detections.detect is right
    clinic.admit("patched", 0)
    clinic.discharge()
    assert detections.detect is right


def test_opening_a_clinic_takes_out_what_another_left(clinic, places):
    right = detections.detect
    clinic.admit("patched", 0)
    Clinic(**places)
    assert detections.detect is right


def test_the_guess_comes_first(clinic):
    patient = clinic.admit("patched", 0)
    for wanted in (patient.diagnose, patient.reveal):
        with pytest.raises(InputError, match="comes after your guess"):
            wanted()
    patient.guess = "no_objects"
    assert "the guess was no_objects" in patient.reveal()
    patient.guess = "threshold_ignored"
    assert patient.reveal().startswith("threshold_ignored (row 8), as guessed")


def test_the_diagnosis_runs_with_the_fault_in_place(clinic, monkeypatch):
    seen = []
    monkeypatch.setattr(
        clinic_module, "diagnose", lambda folder: seen.append((folder, detections.detect))
    )
    right = detections.detect
    patient = clinic.admit("patched", 0)
    patient.guess = "no_objects"
    patient.diagnose()
    [(folder, detect)] = seen
    assert folder == patient.folder
    assert detect is not right


def test_the_same_case_draws_the_same_fault(clinic, monkeypatch):
    monkeypatch.setattr(clinic_module, "WARDS", {"all": ("patched", "spoiled")})
    drawn = [clinic.admit("all", case)._fault for case in (0, 1, 2, 3, 4, 5, 0)]
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
