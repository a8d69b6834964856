import time

from notebooks.training_log import LiveLog


def test_live_log_draws_its_first_frame_empty():
    panel = LiveLog()
    assert panel.readout.value == "training has not started"
    assert "data:image/png;base64," in panel.picture.value


def test_live_log_reads_out_step_and_loss():
    panel = LiveLog()
    panel.update({"step": 3, "loss": 2.5})
    panel.update({"step": 3, "eval_AP50": 0.5})
    panel.redraw()
    assert panel.readout.value == "step 3: training loss 2.500"
    assert panel.log == [{"step": 3, "loss": 2.5}, {"step": 3, "eval_AP50": 0.5}]


def test_live_log_does_not_redraw_at_every_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    panel = LiveLog()
    first = panel.picture.value
    panel.update({"step": 1, "loss": 2.5})
    assert panel.picture.value == first
    now[0] += 2
    panel.update({"step": 2, "loss": 2.0})
    assert panel.picture.value != first


def test_live_log_follows_a_trainer_silently(capsys):
    class State:
        global_step = 7

    panel = LiveLog()
    panel.on_log(None, State, None, logs={"loss": 1.25})
    panel.on_train_end(None, State, None)
    assert panel.log == [{"loss": 1.25, "step": 7}]
    assert panel.readout.value == "step 7: training loss 1.250"
    assert capsys.readouterr() == ("", "")
