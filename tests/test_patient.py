"""Patients that somebody else trained: recognised, examined as far as they go, alive as well."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_random import RESOLUTION, tiny_model, tiny_processor, tiny_run_config
from torchvision.ops import box_convert
from transformers import Sam3Model

from helpers.__main__ import main
from helpers.causes import TABLE
from helpers.data.dataset import PromptCollator, PromptDataset, load_dataset
from helpers.diagnose import LivePatient, diagnose, open_patient, overfit_one_batch
from helpers.diagnose.data_gates import DATA_GATES, PROMPT_GATES
from helpers.diagnose.diagnosis import pass_gate
from helpers.diagnose.live_gates import DETECT_GATES, LOSS_GATES
from helpers.diagnose.patient import NEEDS, Foreign, Missing, Patient, prompted_view
from helpers.diagnose.run_gates import CONFIG_GATES, FILE_GATES, RUN_GATES
from helpers.errors import InputError
from helpers.files import write_json, write_text
from helpers.foreign import to_native
from helpers.model.losses import sam3_losses
from helpers.train.guards import PATIENCE, Guards, GuardStop

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"


# what lies on a disk


@pytest.fixture
def peft_folder(run_folder, tmp_path):
    """A PEFT folder as any script leaves it: two files, and a base that is known by its folder."""
    folder = tmp_path / "peft"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / name, folder)
    return folder


def test_a_peft_folder_is_asked_what_it_can_answer(peft_folder, data_dir):
    found = diagnose(peft_folder)
    assert found.verdict == "undecided"
    open_gates = {gate.name: gate.needs for gate in found.open_gates}
    assert open_gates["annotation files"] == "data"
    assert open_gates["words of the training"] == "words"
    assert open_gates["loss and objects"] == "loss"
    assert found.asked + len(open_gates) < len(found.gates)
    more = diagnose(peft_folder, data_dir=data_dir, words=["crack"])
    assert more.asked > found.asked + 10
    assert not [gate for gate in more.open_gates if gate.needs is None]
    assert {gate.needs for gate in more.open_gates} == {
        "log",
        "settings",
        "batches",
        "loss",
        "detect",
    }
    assert "decided by" not in more.summary()


def test_settings_that_are_not_stated_are_no_defaults(peft_folder, tmp_path):
    content = json.loads((peft_folder / "adapter_config.json").read_text())
    del content["lora_dropout"]
    write_json(peft_folder / "adapter_config.json", content)
    [gate] = [gate for gate in CONFIG_GATES if gate.name == "regularisation"]
    result = pass_gate(gate, open_patient(peft_folder))
    assert result.needs == "settings"
    assert "lora.dropout, which is not stated" in result.measured
    (tmp_path / "a.yaml").write_text("lora:\n  dropout: 0.5\ntraining:\n  num_epochs: 200\n")
    result = pass_gate(gate, open_patient(peft_folder, config=tmp_path / "a.yaml"))
    assert [one.cause for one in result.evidence] == ["extreme_regularisation"]
    with pytest.raises(Missing, match="lora.rank"):
        _ = open_patient(peft_folder).config.lora.rank
    (tmp_path / "a.yaml").write_text('training:\n  num_epochs: "200"\n')
    result = pass_gate(gate, open_patient(peft_folder, config=tmp_path / "a.yaml"))
    assert (result.status, result.needs) == ("not checked", None)
    assert "training.num_epochs is '200'. Fix: write a number" in result.measured


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("lora_B", lambda tensor: tensor * 0, "adapter_at_zero"),
        ("lora_A", lambda tensor: tensor * float("nan"), "not_finite"),
    ],
)
def test_weights_alone_give_a_cause_away(peft_folder, name, change, cause):
    path = peft_folder / "adapter_model.safetensors"
    save_file({k: change(t) if name in k else t for k, t in load_file(path).items()}, path)
    result = pass_gate(FILE_GATES[1], open_patient(peft_folder))
    assert [one.cause for one in result.evidence] == [cause]


def test_a_run_of_sompote_is_imported_with_its_yaml(tmp_path):
    folder = shutil.copytree(FOREIGN / "text_attention_r8", tmp_path / "run")
    write_text(folder / "data.yaml", "names: [crack]\n")  # not of the training
    patient = open_patient(folder, base=FOREIGN / "base")
    assert patient.config.lora.rank == 8
    assert pass_gate(FILE_GATES[1], patient).status == "ok"
    [gate] = [gate for gate in RUN_GATES if gate.name == "places of LoRA"]
    assert "text_encoder 8" in pass_gate(gate, patient).measured
    place = patient.place
    assert place.is_dir()
    del patient
    assert not place.exists()


def test_what_the_importer_asks_for_can_be_given_to_the_diagnosis(tmp_path, capsys):
    shutil.copy(FOREIGN / "text_attention_r8" / "best_lora_weights.pt", tmp_path / "mine.pt")
    asked = ["diagnose", str(tmp_path / "mine.pt"), "--base", str(FOREIGN / "base")]
    assert main(asked) == 2
    assert "--alpha" in capsys.readouterr().err
    assert main([*asked, "--alpha", "16", "--orientation", "native"]) == 3


def test_of_a_folder_with_checkpoints_alone_the_last_is_taken(peft_folder, tmp_path):
    for step in (90, 100):
        folder = shutil.copytree(peft_folder, tmp_path / "trainer" / f"checkpoint-{step}")
        write_json(folder / "trainer_state.json", {"log_history": [{"step": step, "loss": 1.5}]})
    for patient in (
        open_patient(tmp_path / "trainer"),
        open_patient(tmp_path / "trainer", words=["a"]),
    ):
        assert patient.place.name == "checkpoint-100"
        assert patient.log["step"].tolist() == [100]
    shutil.copy(FOREIGN / "text_attention_r8" / "best_lora_weights.pt", tmp_path / "trainer")
    with pytest.raises(InputError, match="alpha is not in the weights"):  # it is the result
        open_patient(tmp_path / "trainer", base=FOREIGN / "base")


def test_a_log_without_loss_beside_the_weights_stops_nothing(peft_folder):
    write_text(peft_folder / "val_stats.json", '{"coco_eval_bbox": 0.1, "Trainer/epoch": 1}\n')
    with pytest.raises(Missing, match="--log FILE"):
        _ = open_patient(peft_folder).log
    write_text(peft_folder / "train_stats.json", '{"loss": 3.0}\n{"loss": 2.0}\n')
    assert open_patient(peft_folder).log["loss"].tolist() == [3, 2]
    with pytest.raises(InputError, match="holds no loss"):
        open_patient(peft_folder, log=peft_folder / "val_stats.json")


def test_a_peft_folder_is_imported_where_it_is_not_read_as_it_is(peft_folder, base, tmp_path):
    path = peft_folder / "adapter_model.safetensors"
    weights = load_file(path)
    path.unlink()
    with pytest.raises(InputError, match="holds no adapter_model.safetensors"):
        open_patient(peft_folder, base=base)
    torch.save(weights, peft_folder / "adapter_model.bin")
    shutil.copytree(peft_folder, tmp_path / "run" / "adapter")
    for folder in (peft_folder, tmp_path / "run"):
        read = open_patient(folder, base=base).adapter_weights
        assert all(read[key].equal(weights[key]) for key in weights)
    modules = {name: name.removeprefix("base_model.model.").partition(".lora_") for name in weights}
    native = {key: f"base_model.model.{to_native(m[0])}{m[1]}{m[2]}" for key, m in modules.items()}
    (peft_folder / "adapter_model.bin").unlink()
    save_file({native[key]: tensor for key, tensor in weights.items()}, path)
    patient = open_patient(peft_folder, base=base)
    assert pass_gate(FILE_GATES[1], patient).status == "ok"
    assert all(patient.adapter_weights[key].equal(weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lora_alpha": None}, "lora_alpha is None"), ({"peft_type": "IA3"}, "is of type 'IA3'")],
)
def test_an_adapter_config_that_is_none_of_lora_is_refused(peft_folder, change, message):
    path = peft_folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match=message):
        open_patient(peft_folder)


def test_a_file_that_is_called_like_a_run_is_no_run(tmp_path):
    write_text(tmp_path / "config.yaml", "lora: {}\n")
    with pytest.raises(InputError, match="no file of torch"):
        open_patient(tmp_path / "config.yaml")


def test_data_that_settings_name_are_taken_only_from_where_they_say(data_dir):
    patient = Patient(settings={"training": {"data_dir": str(data_dir)}})
    assert patient.data_dir == data_dir
    patient = Patient(settings={"training": {"data_dir": "data/wall_cracks"}})  # of whose folder?
    with pytest.raises(Missing, match="--data DIR"):
        _ = patient.data_dir


def test_claimed_components_are_compared_with_the_file(tmp_path):
    folder = shutil.copytree(FOREIGN / "text_attention_r8", tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    for name in ("vision_encoder", "detr_encoder"):
        text = text.replace(f"apply_to_{name}: false", f"apply_to_{name}: true")
    (folder / "config.yaml").write_text(text)
    [gate] = [gate for gate in RUN_GATES if gate.name == "places of LoRA"]
    result = pass_gate(gate, open_patient(folder, base=FOREIGN / "base"))
    assert result.status == "failed"
    assert any("apply_to_vision_encoder is true" in one.text for one in result.evidence)


def test_a_checkpoint_of_meta_is_a_full_model(base):
    patient = open_patient(FOREIGN / "trainer_checkpoint", base=FOREIGN / "base")
    assert isinstance(patient, Foreign)
    assert not patient.is_adapter
    assert pass_gate(RUN_GATES[1], patient).status == "not applicable"
    seen = pass_gate(FILE_GATES[1], patient)  # without the processor, which the base has not
    assert [one.cause for one in seen.evidence] == ["weights_not_loaded"]
    assert not open_patient(base).is_adapter


def test_a_dataset_alone_is_ranked(data_copy):
    for split in ("train", "valid"):
        path = data_copy / split / "_annotations.coco.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["bbox"] = [number / 60 for number in entry["bbox"]]
        path.write_text(json.dumps(content))
    shutil.rmtree(data_copy / "test")
    shutil.rmtree(data_copy / "valid")  # a missing split is no cause
    found = diagnose(data_copy)
    assert [cause.code for cause in found.causes] == ["boxes_off_masks"]


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "no run, adapter, model, log or dataset"), (("photo.jpg",), "no run, adapter, model")],
)
def test_what_is_nothing_known_is_refused(tmp_path, capsys, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert main(["diagnose", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_one_source_is_named(run_folder, capsys):
    assert main(["diagnose"]) == 2
    assert main(["diagnose", str(run_folder), "--adapter", str(run_folder)]) == 2
    assert "name one SOURCE" in capsys.readouterr().err


# what is alive


def lora_model(seed=0):
    torch.manual_seed(seed)
    names = ["q_proj", "v_proj", "fc1"]
    with warnings.catch_warnings(action="ignore"):  # PEFT asks for an attribute's old name
        model = get_peft_model(
            Sam3Model(tiny_model().config), LoraConfig(r=4, target_modules=names)
        )
    model.get_base_model().load_state_dict(wrapped(tiny_model(), model))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def wrapped(base, model):
    """Return the weights of a base under the names that they have inside of PEFT."""
    own = model.get_base_model().state_dict()
    weights = base.state_dict()
    return {k: weights.get(k.replace(".base_layer", ""), tensor) for k, tensor in own.items()}


def loss(outputs, targets):
    """Return SAM3's own loss of plain `Sam3Model` outputs."""
    named = {
        "pred_logits": outputs.pred_logits,
        "presence_logits": outputs.presence_logits,
        "pred_boxes_cxcywh": box_convert(outputs.pred_boxes, "xyxy", "cxcywh"),
        "pred_masks": outputs.pred_masks,
        "semantic_logits": outputs.semantic_seg,
    }
    pairs = [{"boxes_cxcywh": t["boxes"], "masks": t["masks"]} for t in targets]
    return sam3_losses(named, pairs)


@pytest.fixture(scope="module")
def batches(base, data_dir):
    config = tiny_run_config(base, data_dir)
    split = load_dataset(config).split("train")
    data = PromptDataset.from_config(config, split, tiny_model(), tiny_processor())
    items = [data[index] for index in range(3)]
    batch = PromptCollator(data.processor)(items)
    names = [item["queries"][0]["image_id"] for item in items]
    targets = [{"boxes": t["boxes_cxcywh"], "masks": t["masks"]} for t in batch["targets"]]
    kept = ("pixel_values", "input_ids", "attention_mask", "image_index")
    return [{name: batch[name] for name in kept} | {"targets": targets, "image_ids": names}]


def detect_with(model, processor, change=lambda outputs: outputs):
    """Return a detection as people write it, around the processor's post-processing."""

    def detect(picture, word, threshold=0.3):
        inputs = processor(images=picture, text=word, return_tensors="pt")
        with torch.no_grad():
            outputs = change(model(**inputs))
        size = [picture.size[::-1]]
        return processor.post_process_instance_segmentation(outputs, threshold, 0.5, size)[0]

    return detect


def live(batches, data_dir, model=None, **changes):
    model, processor = model or lora_model(), tiny_processor()
    own = {"model": model, "processor": processor, "batches": batches, "loss": loss}
    own |= {"detect": detect_with(model, processor), "data_dir": data_dir}
    return LivePatient(**own | changes)


LIVE_GATES = (*DATA_GATES[5:], *PROMPT_GATES[1:3], *LOSS_GATES, *DETECT_GATES)


def examined(patient):
    with patient.at_rest():
        results = {gate.name: pass_gate(gate, patient) for gate in LIVE_GATES}
    return results, {one.cause for result in results.values() for one in result.evidence}


def test_a_sound_pipeline_passes_every_gate_and_is_left_as_it_was(batches, data_dir):
    model = lora_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results, causes = examined(live(batches, data_dir, model))
    assert {
        name: r.measured for name, r in results.items() if r.status not in ("ok", "not applicable")
    } == {}
    assert causes == set()
    assert model.training
    assert type(model.get_base_model()) is Sam3Model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def retargeted(batches, change):
    return [
        batch | {"targets": [change({**target}) for target in batch["targets"]]}
        for batch in batches
    ]


def with_boxes(change):
    return lambda target: target | {"boxes": change(target["boxes"])}


def empty(target):
    return {name: values[:0] for name, values in target.items()}


@pytest.mark.parametrize(
    ("change", "gate", "cause"),
    [
        (empty, "objects after the loader", "no_objects"),
        (with_boxes(lambda boxes: boxes * 56), "box targets", "wrong_box_targets"),
        (
            with_boxes(lambda boxes: box_convert(boxes, "cxcywh", "xyxy")),
            "box targets",
            "wrong_box_targets",
        ),
        (
            with_boxes(lambda boxes: box_convert(boxes, "cxcywh", "xywh")),
            "box targets",
            "wrong_box_targets",
        ),
        (lambda t: t | {"masks": t["masks"] * 0}, "masks after the loader", "masks_lost"),
    ],
)
def test_a_mistake_in_the_targets_is_seen_in_the_batches(batches, data_dir, change, gate, cause):
    results, _ = examined(live(retargeted(batches, change), data_dir, loss=None, detect=None))
    assert {one.cause for one in results[gate].evidence} == {cause}


def only_positives(batch):
    rows = [row for row, target in enumerate(batch["targets"]) if len(target["boxes"])]
    picked = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "image_index")}
    return batch | picked | {"targets": [batch["targets"][row] for row in rows]}


def other_word(batch):
    ids = tiny_processor()(text=["object"], return_tensors="pt")["input_ids"][0]
    rows = [
        ids if len(target["boxes"]) else row
        for row, target in zip(batch["input_ids"], batch["targets"], strict=True)
    ]
    return batch | {"input_ids": torch.stack(rows)}


@pytest.mark.parametrize(
    ("change", "gate", "cause"),
    [
        (only_positives, "absent prompts", "only_positive_prompts"),
        (other_word, "words of the training", "other_training_prompt"),
    ],
)
def test_the_words_of_the_batches_are_compared(batches, data_dir, change, gate, cause):
    patient = live([change(batch) for batch in batches], data_dir, loss=None, detect=None)
    results, _ = examined(patient)
    assert {one.cause for one in results[gate].evidence} == {cause}


def changed_loss(change):
    return lambda outputs, targets: change(loss(outputs, targets), outputs, targets)


def without(*names):
    return changed_loss(
        lambda terms, *_: sum(v for k, v in terms.items() if k not in (*names, "total"))
    )


def with_corners(outputs, targets):
    """Compare corners with centres, as a loss does that forgets to convert what the model says."""
    boxes = outputs.pred_boxes
    total = sum(
        (boxes[b, : len(t["boxes"])] - t["boxes"]).abs().sum() for b, t in enumerate(targets)
    )
    logits = outputs.pred_logits
    truth = torch.zeros_like(logits)
    for row, target in enumerate(targets):
        truth[row, : len(target["boxes"])] = 1
    return total + torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)


def outlines_alone(outputs, targets):
    """Compare the semantic mask with the union of all masks, as people train that segment only."""
    probs = outputs.semantic_seg[:, 0].sigmoid()
    size = probs.shape[-2:]
    unions = [t["masks"].amax(0) if len(t["masks"]) else torch.zeros(size) for t in targets]
    truth = torch.stack([union.to(probs) for union in unions])
    overlap = (probs * truth).sum((1, 2))
    return (1 - (2 * overlap + 1) / (probs.sum((1, 2)) + truth.sum((1, 2)) + 1)).mean()


@pytest.mark.parametrize(
    ("function", "gate", "cause"),
    [
        (outlines_alone, "loss and objects", "loss_weights"),
        (lambda outputs, targets: 0 * outputs.pred_logits.sum(), "loss of a batch", "no_objects"),
        (
            lambda outputs, targets: loss(outputs, targets)["total"].detach(),
            "loss of a batch",
            "adapter_at_zero",
        ),
        (
            lambda outputs, targets: outputs.pred_logits.sum() * float("nan"),
            "loss of a batch",
            "not_finite",
        ),
        (
            lambda outputs, targets: loss(outputs, [empty(target) for target in targets]),
            "loss and objects",
            "no_objects",
        ),
        (without("loss_ce"), "loss and objects", "loss_weights"),
        (with_corners, "loss and objects", "wrong_box_targets"),
    ],
)
def test_a_loss_that_rewards_the_wrong_thing_is_seen(batches, data_dir, function, gate, cause):
    results, _ = examined(live(batches, data_dir, loss=function, detect=None))
    assert cause in {one.cause for one in results[gate].evidence}, results[gate].measured


def doubled(name):
    def change(outputs):
        outputs[name] = outputs[name].sigmoid()
        return outputs

    return change


def no_presence(outputs):
    outputs["presence_logits"] = torch.full_like(outputs["presence_logits"], 20.0)
    return outputs


def rescaled(result, **changes):
    return result | {name: change(result[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("mistake", "cause"),
    [
        ("no presence", "presence_ignored"),
        ("sigmoid twice", "presence_ignored"),
        ("fractions", "boxes_misplaced"),
        ("swapped size", "boxes_misplaced"),
        ("empty masks", "mask_threshold_on_logits"),
        ("deaf", "threshold_ignored"),
        ("nothing", "threshold_ignored"),
        ("base", "weights_not_loaded"),
    ],
)
def test_a_detection_that_misreads_its_outputs_is_seen(batches, data_dir, mistake, cause):
    model, processor = lora_model(), tiny_processor()
    sound = detect_with(model, processor)
    square = torch.tensor([60.0, 40.0, 60.0, 40.0])

    def copied(change):
        # The model is asked as it is; what it said is changed afterwards.
        return detect_with(model, processor, lambda outputs: change(type(outputs)(**outputs)))

    functions = {
        "no presence": copied(no_presence),
        "sigmoid twice": copied(doubled("pred_logits")),
        "fractions": lambda p, w, threshold=0.3: rescaled(
            sound(p, w, threshold), boxes=lambda boxes: boxes / square
        ),
        "swapped size": lambda p, w, threshold=0.3: rescaled(
            sound(p, w, threshold), boxes=lambda boxes: boxes / square * square.flip(0)
        ),
        "empty masks": lambda p, w, threshold=0.3: rescaled(
            sound(p, w, threshold), masks=lambda masks: masks * 0
        ),
        "deaf": lambda p, w, threshold=0.3: sound(p, w, 0.01),
        "nothing": lambda p, w, threshold=0.3: sound(p, w, 0.99),
        "base": detect_with(tiny_model(), processor),
    }
    patient = live(batches, data_dir, model, detect=functions[mistake], loss=None)
    results, _ = examined(patient)
    assert {one.cause for one in results["detection"].evidence} == {cause}, results[
        "detection"
    ].measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: [1, 2], "a batch lacks pixel_values, input_ids, attention_mask, targets"),
        (
            lambda b: {k: v for k, v in b.items() if k != "attention_mask"},
            "lacks attention_mask; it has",
        ),
        (lambda b: b | {"targets": b["targets"][:1]}, "prompts and 1 targets"),
        (lambda b: {k: v for k, v in b.items() if k != "image_index"}, "no image_index"),
        (lambda b: b | {"targets": [{"bbox": 1}] * len(b["targets"])}, "lacks boxes; it has bbox"),
        (
            lambda b: b | {"targets": [t | {"masks": torch.ones(9, 4, 4)} for t in b["targets"]]},
            "boxes and 9 masks",
        ),
        (lambda b: b | {"targets": torch.zeros(len(b["targets"]))}, "cannot be read .*'get'"),
        (
            lambda b: b | {"targets": [{"boxes": torch.zeros(2, 5)}] * len(b["targets"])},
            "cannot be read .*invalid for input",
        ),
    ],
)
def test_batches_of_another_form_are_refused_by_name(batches, change, message):
    with pytest.raises(InputError, match=message):
        _ = LivePatient(processor=tiny_processor(), batches=[change(batches[0])]).batches


def test_batches_of_the_trainer_of_transformers_are_read(batches):
    """Its collators say ``labels``, one row per picture, without names of files."""
    plain = {key: value for key, value in batches[0].items() if key != "image_ids"}
    batch = dict(plain)
    batch["labels"] = [{"boxes": one["boxes"], "class_labels": 0} for one in batch.pop("targets")]
    read, same = (LivePatient(processor=tiny_processor(), batches=[b]) for b in (batch, plain))
    for (_, one), (_, other) in zip(read.batches[0]["rows"], same.batches[0]["rows"], strict=True):
        assert torch.equal(one["boxes_cxcywh"], other["boxes_cxcywh"])
    assert read.own_names == same.own_names != []


def test_the_objects_of_a_loop_that_trains_outlines_alone_are_read(batches):
    own = LivePatient(processor=tiny_processor(), batches=batches).batches[0]["rows"]
    targets = [{"masks": target["masks"]} for target in batches[0]["targets"]]
    changed = [batches[0] | {"targets": targets}]
    read = LivePatient(processor=tiny_processor(), batches=changed).batches[0]["rows"]
    assert any(len(objects["boxes_cxcywh"]) for _, objects in own)
    for (query, objects), (_, expected) in zip(read, own, strict=True):
        boxes = expected["boxes_cxcywh"]
        assert objects["boxes_cxcywh"].shape == boxes.shape
        assert query["is_positive"] == bool(len(boxes))
        assert torch.allclose(objects["boxes_cxcywh"], boxes, atol=2 / RESOLUTION)


def test_peft_says_what_a_model_in_memory_was_made_from(base):
    model = lora_model()
    model.active_peft_config.base_model_name_or_path = str(base)
    patient = LivePatient(model=model, processor=tiny_processor())
    assert patient.base_name == str(base)
    assert patient.config.lora.dropout == model.active_peft_config.lora_dropout
    with pytest.raises(Missing, match=r"lora\.rank, which is not stated"):
        _ = patient.config.lora.rank


def test_what_a_live_patient_lacks_is_asked_for_by_argument():
    found = diagnose(LivePatient(words=["crack"]))
    assert found.verdict == "undecided"
    assert "give it with data_dir=" in found.summary()
    assert "--data" not in found.summary()
    with pytest.raises(InputError, match="the model is a Linear"):
        LivePatient(model=torch.nn.Linear(1, 1))


def test_a_view_asks_as_the_model_answers(batches):
    model, batch = lora_model().eval(), batches[0]
    row = {name: batch[name][:1] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        plain, ours = model(**row), prompted_view(model)(**row)
    assert torch.allclose(plain.pred_logits, ours.pred_logits, atol=1e-5)


def test_one_batch_is_learned_and_the_weights_put_back(batches, data_dir):
    patient = live(batches, data_dir)
    before = {name: p.detach().clone() for name, p in patient.model.named_parameters()}
    easy = lambda outputs, targets: (outputs.pred_logits - 1).square().mean()  # noqa: E731
    result = overfit_one_batch(
        live(batches, data_dir, patient.model, loss=easy), learning_rate=0.1, steps=20
    )
    assert result["learned"]
    assert result["last"] < 0.1 * result["first"]
    stuck = lambda outputs, targets: 5 + 0 * outputs.pred_logits.sum()  # noqa: E731
    result = overfit_one_batch(live(batches, data_dir, patient.model, loss=stuck), steps=2)
    assert (result["learned"], result["steps"]) == (False, 1)
    assert all(torch.equal(p, before[name]) for name, p in patient.model.named_parameters())


def test_overfit_is_a_command(base, data_dir, tmp_path, capsys, monkeypatch):
    few = partial(overfit_one_batch, steps=3)
    monkeypatch.setattr("helpers.diagnose.live_gates.overfit_one_batch", few)
    write_text(tmp_path / "config.yaml", tiny_run_config(base, data_dir).to_yaml())
    assert main(["overfit", "--config", str(tmp_path / "config.yaml"), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["last"] < result["first"]
    assert result["objects"] > 0


# guards of any loop


def loop(model, change=lambda terms: terms, objects=2, steps=12, **options):
    """Train with a loop of three lines, the guards among them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guards = Guards()
    for _ in range(steps):
        total = sum(p.square().sum() for p in model.parameters())
        terms = {"loss_ce": total, "loss_bbox": total * 2, "loss_mask": total}
        terms = change(terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        guards.step(loss_terms=terms, num_objects=objects, model=model, **options)
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, None),
        ({"objects": 0, "num_images": PATIENCE}, "no_objects"),
        ({"change": lambda t: t | {"loss_bbox": 0 * t["loss_bbox"]}}, "no_objects"),
        ({"change": lambda t: t | {"loss_mask": 0 * t["loss_mask"]}, "num_masks": 2}, "masks_lost"),
        ({"change": lambda t: t | {"loss_ce": t["loss_ce"] * float("nan")}}, "not_finite"),
        ({"change": lambda t: {k: v * 1e-9 for k, v in t.items()}}, "loss_weights"),
        ({"change": lambda t: t | {"loss_ce": 1e4 * t["loss_ce"]}}, "loss_weights"),
        ({"num_absent": 0, "num_images": PATIENCE}, "only_positive_prompts"),
    ],
)
def test_guards_stop_a_loop_that_is_not_ours(options, cause):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    if cause is None:
        loop(model, **options)
    else:
        with pytest.raises(GuardStop) as caught:
            loop(model, **options)
        assert caught.value.cause == cause
        assert caught.value.fix


def test_a_lora_that_does_not_move_stops_a_loop():
    model = lora_model()
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    with pytest.raises(GuardStop) as caught:
        loop(model)
    assert caught.value.cause == "adapter_at_zero"


# the catalogue


def test_the_catalogue_can_be_read_on_the_command_line(capsys):
    assert main(["causes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(TABLE)
    assert main(["causes", "no_objects"]) == 0
    assert TABLE["no_objects"].fix in capsys.readouterr().out
    assert main(["causes", "no_object"]) == 2
    assert "did you mean 'no_objects'" in capsys.readouterr().err


def test_every_part_says_how_to_give_it():
    for part in NEEDS:
        assert str(Missing(part)).startswith("needs ")
        assert "=" in str(Missing(part, is_live=True))
    assert Patient(words=["crack"]).trained_words == ["crack"]
