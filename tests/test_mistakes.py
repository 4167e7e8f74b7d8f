"""What users get wrong at train.py and dataset.py: a line says so and nothing is lost, or it works.

One mistake a test, through the real command line; two scenes are enough for each.
"""
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import model as models
import predict
import train
import utils
from conftest import HEIGHT, SMALL, hurry
from draw_demo import draw_scene, write_scenes

CHECKPOINTS = [("--evaluate", "best.pth"), ("--resume", "best.pth"), ("--resume", "last.pth")]
DIVERGING = ["--learning_rate", "1e30"]  # the first step makes the weights infinite


@pytest.fixture(autouse=True)
def hurry_in_an_empty_folder(tmp_path, monkeypatch):
    """Runs without a name go to tmp_path."""
    monkeypatch.chdir(tmp_path)
    with hurry():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data folder with two training composites and a validation composite. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    write_scenes(folder, {"train": 2, "val": 1}, HEIGHT)
    return folder


@pytest.fixture
def own_tiny(tiny, tmp_path):
    """A copy of `tiny` to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "data"))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run of one epoch on `tiny`. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with hurry():
        train.main(arguments(tiny, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished` to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def arguments(data, output, *more):
    """The flags of a run of one epoch; those in `more` come later and win."""
    return [*map(str, ["--data_dir", data, "--output_dir", output, "--num_epochs", 1, *SMALL, *more])]


def load(path):
    return torch.load(path, weights_only=True)


def edit(path, **changes):
    """Change entries of a checkpoint; None takes one out."""
    content = load(path) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def contents(folder):
    """All files below a folder with what they hold, the large ones with its hash."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content if len(content) < 1000 else hash(content) for name, content in files.items()}


def resume(path, *more):
    train.main(["--resume", str(path), "--num_epochs", "2", *map(str, more)])


def refuse(number, only=""):
    """A function of the system that fails with an errno, for the paths whose names end so."""
    def function(*args, **options):
        if not only or str(args[-1]).endswith(only):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    real = os.replace
    return function


# --- What the arguments alone show to be wrong --------------------------------------------------------------


@pytest.mark.parametrize("flag, value, expected", [
    ("--seed", "-1", "whole number of 0 to"),
    ("--image_size", "32", "multiple of 32 of 64 to 8192"),
    ("--image_size", "100", "multiple of 32 of 64 to 8192"),
    ("--image_size", "320000", "of 64 to 8192"),
    ("--batch_size", "2.5", "whole number of 1 to"),
    ("--num_epochs", "", "whole number of 1 to"),
    ("--num_classes", "21", "whole number of 2 to 20"),
    ("--learning_rate", "nan", "expected a number of"),
    ("--learning_rate", "1e39", "expected a number of"),
    ("--amp", "fp8", "bf16"),
    ("--device", "toaster", "auto, cpu, cuda, cuda:N or mps"),
    ("--best_by", "loss", "mean_iou"),
])
def test_values_out_of_range(flag, value, expected, fails):
    fails(train.main, [flag, value], flag, expected, status=2)


@pytest.mark.parametrize("argv", [
    ["--data_dir", ""], ["--output_dir="], ["--resume", ""], ["--demo", "--encoder_weights", ""],
])
def test_what_a_variable_that_is_not_set_leaves(argv, fails):
    """An empty path would be the folder one happens to stand in."""
    fails(train.main, argv, "empty", "variable", status=2)


@pytest.mark.parametrize("argv, words", [
    (["--demo", "--data_dir", "mine"], ["--demo", "--data_dir", "not allowed"]),
    (["--data_dir", "data/cityscapes_data", "--demo"], ["--demo", "--data_dir", "not allowed"]),
    (["--resume", "a.pth", "--evaluate", "b.pth"], ["--resume", "--evaluate", "not allowed"]),
    (["--resume", "auto"], ["--resume auto", "--output_dir"]),
    (["--flip"], ["--flip", "--evaluate"]),
    (["--flip", "--resume", "a.pth"], ["--flip", "--evaluate"]),
    (["--num_epoch", "3"], ["--num_epoch"]),
    (["data/cityscapes_data"], ["data/cityscapes_data"]),
    (["--data_dir"], ["--data_dir", "expected one argument"]),
])
def test_flags_that_do_not_go_together(argv, words, fails):
    fails(train.main, argv, *words, status=2)


@pytest.mark.parametrize("flag", [
    "--output_dir=x", "--learning_rate=1", "--encoder_weights=none", "--best_by=dice", "--no_cache",
])
def test_flags_that_change_nothing_in_an_evaluation(flag, fails):
    words = [flag.split("=")[0], "--evaluate", "leave it out"]
    fails(train.main, ["--evaluate", "best.pth", flag], *words, status=2)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_numbered_gpu_under_torchrun(processes, tiny, tmp_path, fails, monkeypatch):
    """The process would take the GPU of its own number, whatever was asked for."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fails(train.main, arguments(tiny, tmp_path / "run", "--device", "cuda:1"), "--device cuda:1", "torchrun",
          "pass --device cuda")


def test_a_gpu_that_is_not_here(tiny, tmp_path, fails):
    fails(train.main, arguments(tiny, tmp_path / "run", "--device", "cuda:77"), "--device cuda:77")


# --- Data ---------------------------------------------------------------------------------------------------


def no_data(folder):
    shutil.rmtree(folder)


def a_file(folder):
    no_data(folder)
    folder.write_text("")


def no_val(folder):
    shutil.rmtree(folder / "val")


def empty_val(folder):
    (folder / "val" / "1.jpg").unlink()


def damaged_val(folder):
    (folder / "val" / "1.jpg").write_bytes(b"damaged")


def dangling_val(folder):
    (folder / "val" / "3.jpg").symlink_to(folder / "gone.jpg")


def split_itself(folder):
    """The pictures lie in the folder, not in train/ and val/."""
    shutil.move(folder / "train", folder.parent / "pictures")
    no_data(folder)
    shutil.move(folder.parent / "pictures", folder)


def nested(folder):
    shutil.move(folder, folder.parent / "inner")
    shutil.copytree(folder.parent / "inner", folder / "data")


def all_background(folder):
    for path in (folder / "train").iterdir():
        composite = np.array(Image.open(path))
        composite[:, HEIGHT:] = 0
        Image.fromarray(composite).save(path)


@pytest.mark.parametrize("damage, words", [
    (no_data, ["is missing", "--demo", "pix2pix"]),
    (a_file, ["is missing"]),
    (no_val, ["data/val", "is missing"]),
    (empty_val, ["data/val", "holds no composites"]),
    (damaged_val, ["data/val/1.jpg", "save it anew or leave it out"]),
    (dangling_val, ["data/val/3.jpg", "No such file"]),
    (nested, ["one folder deeper", "pass --data_dir", "data/data"]),
    (all_background, ["train/: every pixel of its labels is background"]),
    (split_itself, ["is missing", "train/ and val/"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_data_that_are_not_as_expected_leave_the_folder_free(damage, words, own_tiny, tmp_path, fails):
    output = tmp_path / "run"
    damage(own_tiny)
    fails(train.main, arguments(own_tiny, output), *words)
    assert not output.exists()


def test_the_same_command_works_once_the_composite_is_whole_again(own_tiny, tiny, tmp_path, fails):
    damaged_val(own_tiny)
    fails(train.main, arguments(own_tiny, tmp_path / "run"), "val/1.jpg")
    shutil.copy(tiny / "val" / "1.jpg", own_tiny / "val")
    train.main(arguments(own_tiny, tmp_path / "run"))
    assert (tmp_path / "run" / "last.pth").exists()


def test_fewer_classes_than_the_labels_hold(tiny, tmp_path, fails):
    argv = arguments(tiny, tmp_path / "run", "--num_classes", 2)
    fails(train.main, argv, "1.jpg", "class id", "not below --num_classes 2")


# --- Checkpoints --------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:100_000])


def empty(path):
    path.write_bytes(b"")


def a_number(path):
    torch.save({"out.weight": torch.tensor(1.0)}, path)


def of_one_class(path):
    torch.save({"out.weight": torch.zeros(1, 24, 1, 1)}, path)


def one_bit_flipped(path):
    """By a failing disk, somewhere in the weights: it would load, and score less."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_optimizer(path):
    edit(path, optimizer={"state": {}, "param_groups": []})


def older_version(path):
    config = load(path)["config"]
    edit(path, config={key: value for key, value in config.items() if key != "measured_on"})


def without_numbers(path):
    content = load(path)
    content["average"]["out.bias"][3] = torch.nan
    torch.save(content, path)


def absent(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage, words", [
    (absent, ["No such file"]),
    (a_folder, ["cannot be read"]),
    (empty, ["undamaged"]),
    (truncated, ["undamaged"]),
    (one_bit_flipped, ["undamaged"]),
    (a_number, ["no checkpoint of EfficientSegNet"]),
    (of_one_class, ["no checkpoint of EfficientSegNet", "two or more classes"]),
    (another_optimizer, ["does not fit"]),
    (older_version, ["older version", "best.pth"]),
    (without_numbers, ["NaN"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_checkpoints_that_cannot_be_resumed(damage, words, run, tiny, fails):
    damage(run / "last.pth")
    before = contents(run)
    argv = ["--resume", run / "last.pth", "--num_epochs", 2, "--data_dir", tiny]
    fails(train.main, argv, "last.pth", *words)
    assert contents(run) == before


def test_an_older_last_pth_can_still_be_scored(run, capsys):
    older_version(run / "last.pth")
    train.main(["--evaluate", str(run / "last.pth"), "--device", "cpu"])
    assert "dice" in capsys.readouterr().out


def test_another_programs_optimizer_starts_a_new_run_or_says_what_to_do(finished, tiny, tmp_path, capsys):
    """An older version of this program did not write it, and there is no best.pth beside it."""
    other = tmp_path / "other" / "checkpoint.pth"
    other.parent.mkdir()
    torch.save({"model": load(finished / "best.pth")["model"], "optimizer": {}, "epoch": 3}, other)
    train.main(["--resume", str(other), "--data_dir", str(tiny), "--num_epochs", "1", *SMALL[2:]])
    assert "a new run starts from its weights" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_more_classes_than_the_table_holds(flag, finished, tiny, tmp_path, fails):
    """A bare state_dict of 25 classes: what the last five are, nobody can say."""
    weights = load(finished / "best.pth")["model"]
    for name in ("out.weight", "out.bias"):
        weights[name] = torch.cat([weights[name], weights[name][:5]])
    torch.save(weights, tmp_path / "bare.pth")
    argv = [flag, "bare.pth", "--data_dir", tiny, *SMALL[2:]]
    argv += ["--num_epochs", 1] if flag == "--resume" else []
    fails(train.main, argv, "bare.pth", "25 classes", "CLASSES")


def test_finished_runs_say_how_to_go_on(finished, fails):
    fails(train.main, ["--resume", finished / "last.pth"], "1 epoch", "--num_epochs")


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_another_number_of_classes_than_the_checkpoints(flag, finished, fails):
    fails(train.main, [flag, finished / "last.pth", "--num_classes", 7], "--num_classes is 7", "20 classes")


@pytest.mark.parametrize("content, words", [
    (None, ["No such file"]),
    ({"features.0.0.weight": torch.zeros(1)}, ["efficientnet_b0 state_dict"]),
    ({"out.weight": torch.zeros(1)}, ["efficientnet_b0 state_dict"]),
    ([1, 2], ["holds a list"]),
], ids=["absent", "another network", "a checkpoint", "a list"])
def test_encoder_weights_that_do_not_fit(content, words, tiny, tmp_path, fails):
    path = tmp_path / "encoder.pth"
    if content is not None:
        torch.save(content, path)
    fails(train.main, arguments(tiny, tmp_path / "run", "--encoder_weights", path), "encoder.pth", *words)
    assert not (tmp_path / "run").exists()


# --- The class table edited ---------------------------------------------------------------------------------


@pytest.fixture
def edit_classes(monkeypatch):
    """Edit CLASSES of dataset.py for one test."""
    return lambda classes: monkeypatch.setattr(dataset, "CLASSES", tuple(classes))


def renamed(classes):
    return [*classes[:5], classes[5]._replace(name="railing"), *classes[6:]]


def reordered(classes):
    return [*classes[:12], classes[13], classes[12], *classes[14:]]


def recoloured(classes):
    return [*classes[:7], classes[7]._replace(color=(250, 171, 33)), *classes[8:]]


def cut(classes):
    return classes[:19]


@pytest.mark.parametrize("case", [
    (renamed, ["class 5 is fence", "railing"]),
    (reordered, ["class 12 is person", "rider"]),
    (recoloured, ["class 7 is traffic light", "(250, 171, 33)"]),
    (cut, ["class 19 is bicycle", "missing"]),
], ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=" ".join)
def test_a_checkpoint_whose_ids_mean_something_else(checkpoint, case, finished, edit_classes, fails):
    (flag, name), (change, words) = checkpoint, case
    edit_classes(change(dataset.CLASSES))
    more = ["--num_epochs", 2] if flag == "--resume" else []
    fails(train.main, [flag, finished / name, *more, "--device", "cpu"], name, *words, "restore CLASSES")


def test_a_class_added_behind_the_others_leaves_their_ids(finished, edit_classes, capsys):
    edit_classes([*dataset.CLASSES, dataset.SegmentationClass("ego vehicle", (0, 255, 255))])
    train.main(["--evaluate", str(finished / "best.pth"), "--device", "cpu"])
    assert "bicycle" in capsys.readouterr().out


def test_a_class_table_of_one(edit_classes, tiny, fails):
    edit_classes(dataset.CLASSES[:1])
    fails(train.main, arguments(tiny, "run"), "dataset.py", "2 to 60 classes")


def test_a_class_table_with_one_colour_twice(edit_classes, tiny, fails):
    edit_classes([*dataset.CLASSES, dataset.SegmentationClass("asphalt", (128, 64, 128))])
    fails(train.main, arguments(tiny, "run"), "dataset.py", "'road'", "'asphalt'", "same colour")


@pytest.mark.parametrize("color", [(0, 0, 256), (0, 0), "#00ff00", (0.5, 0.5, 0.5)], ids=str)
def test_a_class_table_with_a_colour_that_is_none(color, edit_classes, tiny, fails):
    edit_classes([*dataset.CLASSES, dataset.SegmentationClass("ego vehicle", color)])
    fails(train.main, arguments(tiny, "run"), "dataset.py", "'ego vehicle'", "0 to 255")


def test_a_table_of_three_other_classes_is_trained_scored_and_drawn(edit_classes, tmp_path, capsys):
    """No other place in the code names a class or a colour."""
    edit_classes(map(dataset.SegmentationClass, ("nothing", "water", "land"),
                     ((9, 9, 9), (0, 90, 255), (200, 180, 20))))
    label = np.repeat(np.uint8([0, 1, 2, 2]), 16)[None].repeat(64, axis=0)
    composite = np.concatenate([draw_scene(0, 64)[0], dataset.colorize(label)], axis=1)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Image.fromarray(composite).save(tmp_path / "data" / split / "1.png")
    train.main(arguments("data", "run"))
    predict.main(["data/val", "--composite", "--overlay", "--device", "cpu", "--checkpoint", "run/best.pth",
                  "--output", "masks"])
    assert load("run/best.pth")["config"]["class_names"] == ["nothing", "water", "land"]
    assert np.asarray(Image.open("masks/1.png")).max() < 3 and "water" in capsys.readouterr().out


# --- A given flag and a remembered one ----------------------------------------------------------------------


def test_a_demo_given_wins_over_a_remembered_data_folder(run, own_tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "DEMO_DIR", own_tiny)
    train.main(["--evaluate", str(run / "best.pth"), "--demo", "--device", "cpu"])
    assert f"composites of {own_tiny} at" in capsys.readouterr().out


def test_flags_given_with_resume_win_and_are_remembered(run, capsys):
    resume(run / "last.pth", "--batch_size", 1, "--amp", "off", "--seed", 7, "--learning_rate", "5e-4")
    settings = load(run / "last.pth")["config"]["settings"]
    assert [settings[name] for name in ("batch_size", "amp", "seed", "learning_rate")] == [1, "off", 7, 5e-4]
    assert json.loads((run / "config.json").read_text())["settings"] == settings
    output = capsys.readouterr().out
    for words in ("2 epochs of 2 steps, 1 x 1", "float32 (--amp off)", "up to 0.0005"):
        assert words in output


def test_weights_alone_start_a_new_run_and_the_line_says_what_is_their_own(finished, capsys):
    train.main(["--resume", str(finished / "best.pth"), "--output_dir", "new", "--num_epochs", "1"])
    output = capsys.readouterr().out
    assert "a new run starts from its weights" in output
    assert "at 64x64" in output and load("new/last.pth")["epoch"] == 1


def test_encoder_weights_are_those_of_the_checkpoint(finished, tiny, tmp_path, capsys):
    """Where they come from a bare state_dict, nobody knows whether they were ImageNet's."""
    torch.save(load(finished / "best.pth")["model"], tmp_path / "bare.pth")
    argv = ["--data_dir", str(tiny), "--output_dir", "new", "--num_epochs", "1", *SMALL[2:]]
    train.main(["--resume", "bare.pth", *argv])
    assert "encoder weights: imagenet" not in capsys.readouterr().out
    assert load(tmp_path / "new" / "last.pth")["config"]["settings"]["encoder_weights"] != "imagenet"


# --- Whose folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["new run", "resume"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(how, finished, tiny, run, fails):
    before = contents(run)
    argv = arguments(tiny, run) if how == "new run" else [
        "--resume", finished / "last.pth", "--output_dir", run, "--num_epochs", 2]
    fails(train.main, argv, run, "holds last.pth of another run", "--resume")
    assert contents(run) == before


def test_a_run_goes_on_in_a_new_folder_and_leaves_the_old_one_as_it_was(run, tmp_path):
    before = contents(run)
    resume(run / "last.pth", "--output_dir", tmp_path / "new")
    assert contents(run) == before
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(train.RUN_FILES)


@pytest.mark.parametrize("name", ["run/", "link"])
def test_the_same_folder_under_another_name_is_the_runs_own(name, run, tmp_path, fails):
    """It gets as far as training, where another folder that holds a run is refused."""
    (tmp_path / "link").symlink_to(run)
    argv = ["--resume", run / "last.pth", "--num_epochs", 2, "--output_dir", name, *DIVERGING]
    fails(train.main, argv, "became nan")


def test_files_that_are_the_users_stay_whatever_happens(tiny, tmp_path, fails):
    output = tmp_path / "run"
    output.mkdir()
    mine = {"notes.txt": b"mine", "model.pth": b"mine", ".hidden": b"mine", ".mine.tmp": b"mine"}
    for name, content in mine.items():
        (output / name).write_bytes(content)
    fails(train.main, arguments(tiny, output, *DIVERGING), "became")
    assert {str(name): content for name, content in contents(output).items() if str(name) in mine} == mine
    train.main(arguments(tiny, output))
    assert (output / "last.pth").exists()
    assert all((output / name).read_bytes() == content for name, content in mine.items())


@pytest.mark.parametrize("name", ["best.pth", "history.csv", "predictions.png"])
def test_a_file_that_somebody_put_there_is_never_overwritten(name, tiny, tmp_path, fails):
    output = tmp_path / "run"
    output.mkdir()
    (output / name).write_bytes(b"mine")
    fails(train.main, arguments(tiny, output), name, "choose another folder")
    assert contents(output) == {Path(name): b"mine"}


def test_a_config_json_of_another_program_is_never_overwritten(tiny, tmp_path, fails):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.json").write_text('{"editor": "mine"}')
    fails(train.main, arguments(tiny, output, *DIVERGING), "config.json", "choose another folder")
    assert (output / "config.json").read_text() == '{"editor": "mine"}'


# --- A run that ends before its first epoch -----------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loss_that_is_no_number_leaves_the_folder_free(at_once, tiny, tmp_path, fails, monkeypatch):
    """A lone config.json is left, and the next run may take the folder."""
    monkeypatch.setattr(train, "BAR_SECONDS", -1 if at_once else 1)
    argv = arguments(tiny, tmp_path / "run", "--batch_size", 1)
    fails(train.main, [*argv, *DIVERGING], "the loss became nan in epoch 1, at step 2", "--learning_rate")
    assert list(contents(tmp_path / "run")) == [Path("config.json")]
    train.main(argv)


def test_a_loss_that_is_no_number_later_keeps_the_checkpoints_and_says_so(run, fails):
    before = contents(run)
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2, *DIVERGING], "became nan in epoch 2",
          "--learning_rate", "--amp off", f'go on with it: --resume "{run / "last.pth"}"')
    assert contents(run) == before


@pytest.mark.usefixtures("heeding_signals")
@pytest.mark.parametrize("moment, signal_number", [
    ("open_splits", signal.SIGTERM), ("keep_inputs", signal.SIGINT), ("train_one_epoch", signal.SIGINT),
])
def test_stopping_a_new_run_before_its_first_epoch(moment, signal_number, tiny, monkeypatch, fails):
    def stop(*args, **options):
        signal.raise_signal(signal_number)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(train, moment, stop)
    words = [f"stopped by {signal_number.name}", "start again"]
    fails(train.main, arguments(tiny, "run"), *words, status=128 + signal_number)
    assert not Path("run", "last.pth").exists()


@pytest.mark.parametrize("moment", ["train_one_epoch", "report_best"])
def test_stopping_a_resumed_run_at_any_moment_leaves_its_checkpoints(moment, run, monkeypatch, fails):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, moment, stop)
        argv = ["--resume", run / "last.pth", "--num_epochs", 2]
        fails(train.main, argv, "go on with", f'--resume "{run / "last.pth"}"', status=130)
    assert load(run / "last.pth")["epoch"] == (2 if moment == "report_best" else 1)


def test_a_new_best_epoch_makes_the_report_on_the_one_before_void(run, monkeypatch):
    lower_the_best(run, -0.5)

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "report_best", stop)
        resume(run / "last.pth", "--num_epochs", 2)
    assert load(run / "best.pth")["best"]["epoch"] == 2
    assert not any((run / name).exists() for name in train.REPORT_FILES)
    resume(run / "last.pth")
    assert all((run / name).exists() for name in train.RUN_FILES)


# --- The best epoch -----------------------------------------------------------------------------------------


def lower_the_best(run, figure):
    """Let the best epoch so far have had this figure; no epoch beats 2, each beats -0.5."""
    last, best = load(run / "last.pth"), load(run / "best.pth")
    last["history"][0]["val_dice"] = last["best"]["figure"] = best["best"]["figure"] = figure
    edit(run / "last.pth", history=last["history"], best=last["best"])
    edit(run / "best.pth", best=best["best"])


@pytest.fixture
def unbeatable(run):
    """A run whose best epoch so far scored more than any can."""
    lower_the_best(run, 2.0)
    return run / "last.pth"


@pytest.mark.parametrize("moved", [False, True])
def test_an_old_best_that_no_epoch_beats_stays(moved, unbeatable, tiny, capsys):
    """Data that only moved are the same."""
    before = unbeatable.with_name("best.pth").read_bytes()
    shutil.copytree(tiny, "moved")
    resume(unbeatable, *(["--data_dir", "moved"] if moved else []))
    assert unbeatable.with_name("best.pth").read_bytes() == before and load(unbeatable)["epoch"] == 2
    assert "sought anew" not in capsys.readouterr().out


def test_a_run_that_goes_on_elsewhere_takes_its_best_epoch_along(unbeatable, run, tmp_path):
    resume(unbeatable, "--output_dir", tmp_path / "new")
    assert (tmp_path / "new" / "best.pth").read_bytes() == (run / "best.pth").read_bytes()


def one_more(folder):
    shutil.copy(folder / "val" / "1.jpg", folder / "val" / "2.jpg")


def another_name(folder):
    (folder / "val" / "1.jpg").rename(folder / "val" / "2.jpg")


def another_picture(folder):
    shutil.copy(folder / "train" / "1.jpg", folder / "val" / "1.jpg")


def other_table(monkeypatch):
    """The labels mean something else, though no class has changed."""
    further = dataset.CLASSES[0].further | {"ego vehicle": (10, 200, 10)}
    classes = (dataset.CLASSES[0]._replace(further=further), *dataset.CLASSES[1:])
    monkeypatch.setattr(dataset, "CLASSES", classes)


def is_missing(run):
    (run / "best.pth").unlink()


def of_another_run(run):
    best = load(run / "best.pth")
    edit(run / "best.pth", best=best["best"] | {"figure": 0.123})


@pytest.mark.parametrize("flags", [["--image_size", "96"], ["--best_by", "mean_iou"]], ids=" ".join)
def test_with_other_flags_the_best_is_sought_anew(flags, unbeatable, run, capsys):
    """best.pth says at which size its weights are to be used, and by what it was chosen."""
    resume(unbeatable, *flags)
    best = load(run / "best.pth")
    assert best["best"]["epoch"] == 2 and best["config"]["settings"][flags[0][2:]] in (96, "mean_iou")
    assert "sought anew" in capsys.readouterr().out


@pytest.mark.parametrize("change", [another_name, another_picture])
def test_on_other_validation_composites_the_best_is_sought_anew(change, unbeatable, run, own_tiny, capsys):
    change(own_tiny)
    resume(unbeatable, "--data_dir", own_tiny)
    assert load(run / "best.pth")["best"]["epoch"] == 2 and "sought anew" in capsys.readouterr().out


@pytest.mark.parametrize("change", [is_missing, of_another_run])
def test_without_the_runs_own_best_pth_the_best_is_sought_anew(change, unbeatable, run, capsys):
    change(run)
    resume(unbeatable)
    assert load(run / "best.pth")["best"]["epoch"] == 2 and "sought anew" in capsys.readouterr().out


def test_with_other_further_colours_the_best_is_sought_anew(unbeatable, run, monkeypatch, capsys):
    other_table(monkeypatch)
    resume(unbeatable)
    assert load(run / "best.pth")["best"]["epoch"] == 2 and "sought anew" in capsys.readouterr().out


def test_a_report_on_other_data_without_a_new_epoch_does_not_invent_a_best(run, own_tiny, capsys):
    (run / "per_class.csv").unlink()
    one_more(own_tiny)
    before = (run / "best.pth").read_bytes()
    argv = ["--resume", run / "last.pth", "--data_dir", own_tiny]
    with pytest.raises(SystemExit):
        train.main(list(map(str, argv)))
    assert "more --num_epochs" in capsys.readouterr().err
    assert (run / "best.pth").read_bytes() == before


def test_a_report_after_a_kill_writes_the_last_row_of_the_history_too(run):
    """kill -9 between last.pth and history.csv of the last epoch."""
    history = (run / "history.csv").read_text()
    for name in ("history.csv", "curves.png", "predictions.png", "confusion_matrix.png", "per_class.csv"):
        (run / name).unlink()
    train.main(["--resume", str(run / "last.pth")])
    assert (run / "history.csv").read_text() == history
    assert sorted(path.name for path in run.iterdir()) == sorted(train.RUN_FILES)


def test_a_resume_that_fails_on_its_data_changes_nothing(run, own_tiny, fails):
    damaged_val(own_tiny)
    before = contents(run)
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2, "--data_dir", own_tiny], "val/1.jpg")
    assert contents(run) == before


def test_remembered_data_that_are_not_here_are_named(run, fails):
    """A run started with a relative path, resumed from another working directory."""
    config = load(run / "last.pth")["config"]
    edit(run / "last.pth", config=config | {"settings": config["settings"] | {"data_dir": "here/only"}})
    before = contents(run)
    argv = ["--resume", run / "last.pth", "--num_epochs", 2]
    fails(train.main, argv, "here/only", "is missing", "--data_dir")
    assert contents(run) == before


# --- Files that cannot be written ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["history.csv", "curves.png"])
def test_what_is_for_looking_at_is_written_again_when_possible(name, run, capsys, monkeypatch):
    def say(message="", stream_name="stdout"):
        real(message, stream_name)
        if message.startswith("warning") and (run / name).is_dir():
            (run / name).rmdir()  # somebody has made room

    real = utils.say
    monkeypatch.setattr(utils, "say", say)
    (run / name).unlink()
    (run / name).mkdir()
    resume(run / "last.pth", "--num_epochs", 3)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and name in warnings[0] and "the run goes on" in warnings[0]
    assert load(run / "last.pth")["epoch"] == 3 and (run / name).is_file()
    assert len((run / "history.csv").read_text().splitlines()) == 4
    assert not list(run.glob(".*"))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(run, fails, monkeypatch):
    before = (run / "last.pth").read_bytes()
    monkeypatch.setattr(os, "replace", refuse(errno.EIO, only="last.pth"))
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2], os.strerror(errno.EIO), "last.pth",
          "go on with it: --resume")
    assert (run / "last.pth").read_bytes() == before and not list(run.glob(".*"))


def a_file_above(folder):
    (folder / "file").write_text("")
    return folder / "file" / "run"


def the_file_itself(folder):
    (folder / "file").write_text("")
    return folder / "file"


def a_link_to_nowhere(folder):
    (folder / "link").symlink_to(folder / "unmounted")
    return folder / "link"


def a_long_name(folder):
    return folder / ("x" * 300)


@pytest.mark.parametrize("make", [
    a_file_above, the_file_itself, a_link_to_nowhere, a_long_name,
])
def test_output_folders_that_cannot_be_made(make, tiny, tmp_path, fails):
    output = make(tmp_path)
    fails(train.main, arguments(tiny, output), output)


# --- Memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),  # another program has taken it all
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 687194 bytes."),  # Windows
], ids=["Python", "driver", "Windows"])
def test_memory_that_runs_out_ends_in_a_line(error, tiny, finished, fails, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(models.EfficientSegNet, "decode", fail)
    words = ["memory ran out", "--batch_size", "--no_cache", "--image_size"]
    fails(train.main, arguments(tiny, "run"), *words)
    fails(predict.main, [tiny / "val" / "1.jpg", "--composite", "--checkpoint", finished / "best.pth"],
          "memory ran out")
