"""What users get wrong at train.py and dataset.py: a line says so and nothing is lost, or it works.

One mistake a test, through the real command line; two scenes are enough for each.
"""
import errno
import json
import os
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import metrics
import model as models
import predict
import train
import utils
from conftest import HEIGHT, SMALL, hurry, run_ranks, start
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


@pytest.fixture
def demo_run(tiny, finished, tmp_path, monkeypatch):
    """A run as --demo leaves it; --demo itself takes `tiny` here, which trains sooner."""
    monkeypatch.setattr(train, "DEMO_DIR", tiny)
    folder = Path(shutil.copytree(finished, tmp_path / "demo_run"))
    for name in ("last.pth", "best.pth"):
        config = load(folder / name)["config"]
        edit(folder / name, config=config | {"settings": config["settings"] | {
            "demo": True, "data_dir": "data/cityscapes_data"}})
    return folder


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
    ("--seed", "-1", "whole number of 0 or more"),
    ("--seed", 2**64, "at most"),
    ("--num_workers", "-1", "whole number of 0 or more"),
    ("--num_workers", "two", "whole number of 0 or more"),
    ("--image_size", "0", "multiple of 32 of 32 or more"),
    ("--image_size", "-32", "multiple of 32 of 32 or more"),
    ("--image_size", "100", "multiple of 32 of 32 or more"),
    ("--batch_size", "0", "whole number of 1 or more"),
    ("--batch_size", "2.5", "whole number of 1 or more"),
    ("--num_epochs", "0", "whole number of 1 or more"),
    ("--num_epochs", "", "whole number of 1 or more"),
    ("--num_classes", "1", "whole number of 2 or more, at most 20"),
    ("--num_classes", "21", "whole number of 2 or more, at most 20"),
    ("--learning_rate", "0", "above 0"),
    ("--learning_rate", "-1", "above 0"),
    ("--learning_rate", "nan", "above 0"),
    ("--learning_rate", "inf", "above 0"),
    ("--learning_rate", "fast", "above 0"),
    ("--learning_rate", "1e39", "above 0 that float32 holds"),
    ("--learning_rate", "1e-46", "above 0 that float32 holds"),
    ("--num_epochs", 10**14, "at most 1000000"),
    ("--num_workers", 10**6, "at most 512"),
    ("--amp", "fp8", "bf16"),
])
def test_values_out_of_range(flag, value, expected, fails):
    fails(train.main, [flag, value], flag, expected, status=2)


@pytest.mark.parametrize("argv", [
    ["--data_dir", ""], ["--output_dir", ""], ["--output_dir="], ["--resume", ""], ["--evaluate", ""],
    ["--demo", "--encoder_weights", ""], ["--demo", ""],
])
def test_what_a_variable_that_is_not_set_leaves(argv, fails):
    """An empty path would be the folder one happens to stand in."""
    fails(train.main, argv, "empty", "variable", status=2)


@pytest.mark.parametrize("argv", [["", "--output", "x"], ["x.jpg", "--output", ""], ["x.jpg", "--output="]])
def test_empty_arguments_of_predict(argv, fails):
    fails(predict.main, [*argv, "--checkpoint", "best.pth"], "empty", "variable", status=2)


def test_an_image_size_that_no_memory_holds(capsys):
    """One 0 too many: the process would be killed for its memory, without a word."""
    with pytest.raises(SystemExit) as end:
        train.get_args_parser().parse_args(["--image_size", "320000"])
    assert end.value.code == 2 and "at most" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--demo", "--data_dir", "mine"], ["--demo", "--data_dir", "not allowed"]),
    (["--data_dir", "data/cityscapes_data", "--demo"], ["--demo", "--data_dir", "not allowed"]),
    (["--resume", "a.pth", "--evaluate", "b.pth"], ["--resume", "--evaluate", "not allowed"]),
    (["--resume", "a.pth", "--encoder_weights", "none"], ["--encoder_weights", "--resume", "leave it out"]),
    (["--flip"], ["--flip", "--evaluate"]),
    (["--flip", "--resume", "a.pth"], ["--flip", "--evaluate"]),
    (["--num_epoch", "3"], ["did you mean --num_epochs?"]),
    (["data/cityscapes_data"], ["unknown argument data/cityscapes_data"]),
    (["--data_dir"], ["--data_dir", "expected one argument"]),
])
def test_flags_that_do_not_go_together(argv, words, fails):
    fails(train.main, argv, *words, status=2)


@pytest.mark.parametrize("flag", [
    "--output_dir=x", "--learning_rate=1", "--batch_size=1", "--num_epochs=1", "--seed=1",
    "--encoder_weights=none", "--compile", "--finetune_encoder", "--no_cache",
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


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "cuda:", "meta", ""])
def test_devices_of_no_kind(device, tiny, tmp_path, fails):
    fails(train.main, arguments(tiny, tmp_path / "run", "--device", device), "--device", device, status=2)


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


@pytest.mark.parametrize("damage, words", [
    (no_data, ["is missing", "--demo", "pix2pix"]),
    (a_file, ["is missing"]),
    (no_val, ["data/val", "is missing"]),
    (empty_val, ["data/val", "holds no composites"]),
    (damaged_val, ["data/val/1.jpg", "replace or remove it"]),
    (dangling_val, ["data/val/3.jpg", "no such file"]),
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
    fails(train.main, argv, "1.jpg", "class id", "expected ids below --num_classes 2")


def test_one_composite_is_enough(own_tiny, tmp_path):
    (own_tiny / "train" / "2.jpg").unlink()
    train.main(arguments(own_tiny, tmp_path / "run"))
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 1


def test_one_composite_is_too_little_for_batch_norms_that_see_one_pixel_of_it(own_tiny, tmp_path, fails):
    (own_tiny / "train" / "2.jpg").unlink()
    argv = arguments(own_tiny, tmp_path / "run", "--finetune_encoder")
    train.main(argv)
    argv = arguments(own_tiny, tmp_path / "small", "--finetune_encoder", "--image_size", 32)
    fails(train.main, argv, "--finetune_encoder", "--image_size 64")
    assert not (tmp_path / "small").exists()


def test_num_workers_read_at_the_start(tiny, tmp_path, monkeypatch):
    asked = []

    class DataLoader(dataset.DataLoader):
        def __init__(self, *args, num_workers, **options):
            asked.append(num_workers)
            super().__init__(*args, num_workers=0, **options)

    monkeypatch.setattr(dataset, "DataLoader", DataLoader)
    monkeypatch.setattr(dataset, "MANY_FILES", 1)
    with pytest.raises(SystemExit):
        train.main(arguments(tiny, tmp_path / "run", "--num_workers", 3, *DIVERGING))
    assert asked and set(asked) == {3}


@pytest.mark.parametrize("name", ["", "val", "train/run"])
def test_pictures_of_a_run_are_not_taken_for_composites(name, own_tiny, capsys):
    """Refused, or the data are afterwards as they were."""
    before = [dataset.list_composites(own_tiny / split) for split in ("train", "val")]
    try:
        train.main(arguments("data", own_tiny / name))  # one relative, one absolute
    except SystemExit as end:
        assert end.code in (1, 2) and "--output_dir" in capsys.readouterr().err
    assert [dataset.list_composites(own_tiny / split) for split in ("train", "val")] == before


# --- Checkpoints --------------------------------------------------------------------------------------------


def newer_torch(path):
    """The archive says that a torch of the far future wrote it."""
    copy = path.with_name("copy.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, b"99\n" if entry.filename.endswith("/version") else old.read(entry))
    copy.replace(path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:100_000])


def empty(path):
    path.write_bytes(b"")


def another_network(path):
    torch.save({"features.0.0.weight": torch.zeros(1)}, path)


def a_number(path):
    torch.save({"out.weight": torch.tensor(1.0)}, path)


def of_one_class(path):
    torch.save({"out.weight": torch.zeros(1, 24, 1, 1)}, path)


def one_bit_flipped(path):
    """By a failing disk, somewhere in the weights: it would load, and score less."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_architecture(path):
    torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, path)


def another_optimizer(path):
    edit(path, optimizer={"state": {}, "param_groups": []})


def older_version(path):
    edit(path, best=None)


def absent(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage, words", [
    (absent, ["check the path"]),
    (a_folder, ["cannot be read"]),
    (empty, ["undamaged"]),
    (truncated, ["undamaged"]),
    (newer_torch, ["update torch"]),
    (one_bit_flipped, ["undamaged"]),
    (a_number, ["no checkpoint of EfficientSegNet"]),
    (another_network, ["no checkpoint of EfficientSegNet"]),
    (of_one_class, ["no checkpoint of EfficientSegNet", "two or more classes"]),
    (another_architecture, ["missing"]),
    (another_optimizer, ["does not fit"]),
    (older_version, ["older version", "best.pth"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_checkpoints_that_cannot_be_resumed(damage, words, run, tiny, fails):
    damage(run / "last.pth")
    before = contents(run)
    argv = ["--resume", run / "last.pth", "--num_epochs", 2, "--data_dir", tiny]
    fails(train.main, argv, "last.pth", *words)
    assert contents(run) == before


def test_an_older_last_pth_can_still_be_scored(run, capsys):
    edit(run / "last.pth", best=None)
    train.main(["--evaluate", str(run / "last.pth"), "--device", "cpu"])
    assert "dice" in capsys.readouterr().out


@pytest.mark.parametrize("flag, config", [
    ("--evaluate", "some text"),
    ("--evaluate", {"image_size": [64, 128]}),
    ("--evaluate", {"settings": ["a list"]}),
    ("--evaluate", {"class_names": None, "class_colors": 3}),
    ("--resume", {"settings": {"batch_size": "4", "amp": 3}}),
], ids=["text", "image_size", "list", "classes", "settings"])
def test_another_programs_config_is_no_reason_for_a_traceback(flag, config, run, tiny, capsys):
    """The weights are what counts; the entries may mean anything."""
    edit(run / "best.pth", config=config)
    argv = [flag, run / "best.pth", "--data_dir", tiny, "--device", "cpu"]
    argv += [] if "image_size" in config else ["--image_size", 64]
    argv += ["--num_epochs", 1] if flag == "--resume" else []
    train.main(list(map(str, argv)))
    assert "taking the first 20 of CLASSES" in capsys.readouterr().out


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
    fails(train.main, ["--resume", finished / "last.pth"], "finished its 1 epochs", "--num_epochs 11")


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_another_number_of_classes_than_the_checkpoints(flag, finished, fails):
    fails(train.main, [flag, finished / "last.pth", "--num_classes", 7], "--num_classes 7", "20 classes")


@pytest.mark.parametrize("content, words", [
    (None, ["check the path"]),
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
    """Edit CLASSES of dataset.py for one test; the decoder is built anew."""
    def edit_them(classes):
        monkeypatch.setattr(dataset, "CLASSES", tuple(classes))
        dataset.project_decoder.cache_clear()

    yield edit_them
    monkeypatch.undo()
    dataset.project_decoder.cache_clear()


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


@pytest.mark.parametrize("color", [(0, 0, 256), (0, -1, 0), (0, 0), "#00ff00", 5, (0.5, 0.5, 0.5)], ids=str)
def test_a_class_table_with_a_colour_that_is_none(color, edit_classes, tiny, fails):
    edit_classes([*dataset.CLASSES, dataset.SegmentationClass("ego vehicle", color)])
    fails(train.main, arguments(tiny, "run"), "dataset.py", "'ego vehicle'", "0 to 255")


def test_names_and_colours_of_any_type_end_in_a_readable_checkpoint(edit_classes, tiny, capsys):
    edit_classes(entry._replace(name=np.str_(entry.name), color=tuple(map(np.uint8, entry.color)),
                                thin=np.int64(entry.thin)) for entry in dataset.CLASSES)
    assert dataset.project_decoder().thin.dtype == bool
    train.main(arguments(tiny, "run"))
    train.main(["--evaluate", "run/best.pth", "--device", "cpu"])
    assert load("run/best.pth")["config"]["class_colors"][1] == [128, 64, 128]


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


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_data_given_with_the_checkpoint_of_a_demo_run_are_used(flag, demo_run, own_tiny, capsys):
    more = ["--num_epochs", "1"] if flag == "--resume" else []
    train.main([flag, str(demo_run / "best.pth"), "--data_dir", str(own_tiny), *more, "--device", "cpu"])
    assert f"composites of {own_tiny} at" in capsys.readouterr().out


@pytest.mark.parametrize("flag, name", CHECKPOINTS)
def test_data_given_with_the_checkpoint_of_a_demo_run_must_exist(flag, name, demo_run, tmp_path, fails):
    more = ["--num_epochs", 2] if flag == "--resume" else []
    fails(train.main, [flag, demo_run / name, "--data_dir", tmp_path / "mine", *more, "--device", "cpu"],
          tmp_path / "mine", "is missing")


def test_the_default_data_folder_given_by_name_wins_over_a_remembered_demo(demo_run, fails):
    argv = ["--evaluate", demo_run / "best.pth", "--data_dir", "data/cityscapes_data", "--device", "cpu"]
    fails(train.main, argv, "data/cityscapes_data/val is missing")


def test_a_demo_given_wins_over_a_remembered_data_folder(run, own_tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "DEMO_DIR", own_tiny)
    train.main(["--evaluate", str(run / "best.pth"), "--demo", "--device", "cpu"])
    assert f"composites of {own_tiny} at" in capsys.readouterr().out


def test_a_demo_run_is_remembered(demo_run, tiny, capsys):
    train.main(["--evaluate", str(demo_run / "best.pth"), "--device", "cpu"])
    assert f"composites of {tiny} at" in capsys.readouterr().out


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
    assert "a new run starts from its weights; classes and image size are its own" in output
    assert "at 64x64" in output and load("new/last.pth")["epoch"] == 1


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_an_image_size_that_is_given_is_not_called_the_checkpoints_own(flag, run, capsys):
    more = ["--num_epochs", "1"] if flag == "--resume" else []
    train.main([flag, str(run / "best.pth"), "--image_size", "96", *more, "--device", "cpu"])
    output = capsys.readouterr().out
    assert "at 96x96" in output and "image size are its own" not in output


def test_encoder_weights_of_an_unknown_name_are_taken_for_a_file(tiny, tmp_path, fails):
    fails(train.main, arguments(tiny, tmp_path / "run", "--encoder_weights", "None"), "None cannot be read")


def test_encoder_weights_are_those_of_the_checkpoint(finished, tiny, tmp_path, capsys):
    """Where they come from a bare state_dict, nobody knows whether they were ImageNet's."""
    torch.save(load(finished / "best.pth")["model"], tmp_path / "bare.pth")
    argv = ["--data_dir", str(tiny), "--output_dir", "new", "--num_epochs", "1", *SMALL[2:]]
    train.main(["--resume", "bare.pth", *argv])
    assert "encoder weights: imagenet" not in capsys.readouterr().out
    assert load(tmp_path / "new" / "last.pth")["config"]["settings"]["encoder_weights"] != "imagenet"


def test_a_demo_without_network_remembers_its_random_encoder(tiny, tmp_path, monkeypatch):
    def refuse_download(*args, **options):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse_download)
    monkeypatch.setattr(train, "DEMO_DIR", tiny)
    train.main(["--demo", "--output_dir", str(tmp_path / "run"), "--num_epochs", "1", "--image_size", "64"])
    assert load(tmp_path / "run" / "last.pth")["config"]["settings"]["encoder_weights"] == "none"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["encoder_weights"] == "none"


@pytest.mark.parametrize("earlier, memory", [
    (["cpu", "bfloat16"], 1000),
    (["cuda", "bfloat16"], 10**9),
    ([], 10**9),
], ids=["now in no memory", "now on the host", "now in memory"])
def test_features_that_are_kept_otherwise_are_worth_a_line(earlier, memory, run, monkeypatch, capsys):
    config = load(run / "last.pth")["config"]
    edit(run / "last.pth", config=config | {"features": earlier or None})
    monkeypatch.setattr(utils, "available_memory", lambda: memory)
    with pytest.raises(SystemExit):
        resume(run / "last.pth", "--num_workers", 0, *DIVERGING)
    assert "Resume      features were kept otherwise before" in capsys.readouterr().out


def test_config_json_says_how_features_are_kept_as_the_checkpoint_does(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["features"] == load(finished / "last.pth")["config"]["features"]


# --- Whose folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["new run", "resume"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(how, finished, tiny, run, fails):
    before = contents(run)
    argv = arguments(tiny, run) if how == "new run" else [
        "--resume", finished / "last.pth", "--output_dir", run, "--num_epochs", 2]
    fails(train.main, argv, run, "holds a run already", "--resume")
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


def test_a_link_to_a_checkpoint_goes_on_in_the_runs_folder(run, tmp_path):
    """ln -s runs/x/last.pth newest.pth"""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "newest.pth").symlink_to(run / "last.pth")
    resume(tmp_path / "links" / "newest.pth")
    assert load(run / "last.pth")["epoch"] == 2
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["newest.pth"]


def test_files_that_are_the_users_stay_whatever_happens(tiny, tmp_path, fails):
    output = tmp_path / "run"
    output.mkdir()
    mine = {"notes.txt": b"mine", "model.pth": b"mine", ".hidden": b"mine", ".mine.tmp": b"mine"}
    for name, content in mine.items():
        (output / name).write_bytes(content)
    fails(train.main, arguments(tiny, output, *DIVERGING), "became")
    assert {str(name): content for name, content in contents(output).items()} == mine
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


def test_a_config_json_that_another_process_writes_meanwhile_stays(tiny, tmp_path, fails, monkeypatch):
    """On a file system without locks, as network drives are, it may appear between a look and a rename."""
    output = tmp_path / "run"

    def fsync(descriptor):
        if list(output.glob(".config.json*")):
            (output / "config.json").write_text("theirs")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(utils, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse(errno.ENOLCK)))
    fails(train.main, arguments(tiny, output), output)
    assert contents(output) == {Path("config.json"): b"theirs"}


def test_without_locks_nobody_knows_whether_a_run_was_killed(finished, tiny, tmp_path, fails, monkeypatch):
    """It may as well be reading its data."""
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "run")
    before = contents(tmp_path)
    monkeypatch.setattr(utils, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse(errno.ENOLCK)))
    fails(train.main, arguments(tiny, "run"), "config.json", "choose another folder")
    assert contents(tmp_path) == before


def test_the_file_to_remove_is_named(run, tiny, fails):
    """After a kill -9 between best.pth and last.pth of epoch 1: without best.pth the folder is free."""
    for path in run.iterdir():
        if path.name not in ("best.pth", "config.json"):
            path.unlink()
    fails(train.main, arguments(tiny, run), "best.pth", "remove that file")
    (run / "best.pth").unlink()
    train.main(arguments(tiny, run))


def test_of_two_runs_started_at_once_in_one_folder_one_wins(tiny, tmp_path):
    logs = {seed: tmp_path / f"log{seed}" for seed in (1, 2)}
    processes = [start(train.main, arguments(tiny, tmp_path / "run", "--seed", seed), log)
                 for seed, log in logs.items()]
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    assert sorted(statuses) == [0, 1], [log.read_text() for log in logs.values()]
    winner, loser = statuses.index(0) + 1, logs[statuses.index(1) + 1].read_text()
    assert "another process" in loser or "holds a run already" in loser, loser
    assert "error" in loser.splitlines()[-1] and "Traceback" not in loser, loser
    configs = [load(f"run/{name}")["config"] for name in ("best.pth", "last.pth")]
    for config in (*configs, json.loads(Path("run/config.json").read_text())):
        assert config["settings"]["seed"] == winner
    assert sorted(path.name for path in Path("run").iterdir()) == sorted(train.RUN_FILES)


def test_a_default_name_that_another_run_of_this_second_has_gets_a_number(tiny, monkeypatch):
    class Noon(train.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 1, 1, 12)

    monkeypatch.setattr(train, "datetime", Noon)
    Path("runs/2025-01-01_12-00-00").mkdir(parents=True)
    train.main(["--data_dir", str(tiny), "--num_epochs", "1", *SMALL])
    assert Path("runs/2025-01-01_12-00-00-2/last.pth").exists()
    assert not list(Path("runs/2025-01-01_12-00-00").iterdir())


def test_temporary_names_are_each_processs_own(tmp_path, monkeypatch):
    own = utils.temporary_name(tmp_path / "last.pth")
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert utils.temporary_name(tmp_path / "last.pth") != own


def wait_before_the_first_epoch(argv):
    """A run that has claimed its folder and is still reading its data when it is killed."""
    train.load_splits = lambda *_: time.sleep(600)
    train.main(argv)


def wait_after_the_first_epoch(argv):
    def log(self, message=""):
        real(self, message)
        if message.lstrip().startswith("1/"):
            time.sleep(600)

    real, utils.Runtime.log = utils.Runtime.log, log
    train.main(argv)


def start_and_wait(body, argv, file):
    log = Path("log").absolute()
    process = start(body, argv, log)
    while not file.exists():
        time.sleep(0.02)
        assert process.is_alive(), log.read_text()
    return process


def test_a_folder_whose_run_was_killed_before_its_first_epoch_is_free_again(tiny, tmp_path, fails):
    output = tmp_path / "run"
    process = start_and_wait(wait_before_the_first_epoch, arguments(tiny, output), output / "config.json")
    fails(train.main, arguments(tiny, output), "another process", output)
    assert process.is_alive() and list(contents(output)) == [Path("config.json")]
    process.kill()
    process.join()
    train.main(arguments(tiny, output, "--seed", 5))
    assert json.loads((output / "config.json").read_text())["settings"]["seed"] == 5


def test_a_run_that_still_trains_is_neither_resumed_nor_started_again(tiny, tmp_path, fails, capsys):
    output = tmp_path / "run"
    argv = arguments(tiny, output, "--num_epochs", 3)
    process = start_and_wait(wait_after_the_first_epoch, argv, output / "curves.png")
    before = contents(output)
    fails(train.main, ["--resume", output / "last.pth"], "another process", output)
    fails(train.main, argv, output, "choose another folder")
    train.main(["--evaluate", str(output / "last.pth"), "--device", "cpu"])
    assert contents(output) == before
    process.kill()
    process.join()
    train.main(["--resume", str(output / "last.pth")])
    assert load(output / "last.pth")["epoch"] == 3


def test_what_rank_0_alone_meets_ends_every_rank_with_one_line(tiny, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "last.pth").write_bytes(b"a run")
    statuses, logs = run_ranks(train.main, arguments(tiny, tmp_path / "held"), 2, tmp_path, seconds=60)
    assert statuses == [1, 1] and "holds a run already" in logs[0].splitlines()[-1], logs
    assert "Traceback" not in logs[0] + logs[1] and "error" not in logs[1], logs


def test_temporary_files_of_a_killed_process_are_removed_and_no_others(run):
    (run / ".last.pth.12345.tmp").write_bytes(b"half")
    (run / ".mine").write_bytes(b"mine")
    resume(run / "last.pth")
    assert [path.name for path in run.glob(".*")] == [".mine"]


# --- A run that ends before its first epoch -----------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_loss_that_is_no_number_leaves_the_folder_free(there, tiny, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    if there:
        output.mkdir()
    monkeypatch.setattr(train, "BAR_SECONDS", -1 if there else 1)
    with pytest.raises(SystemExit) as end:
        train.main(arguments(tiny, output, "--batch_size", 1, *DIVERGING))
    error = capsys.readouterr().err
    assert end.value.code == 1 and "the loss became nan in epoch 1, at step 2" in error
    assert error.count("\n") == 1
    assert "--learning_rate" in error and "are kept" not in error
    assert output.exists() == there and not (there and any(output.iterdir()))


def test_a_loss_that_is_no_number_later_keeps_the_checkpoints_and_says_so(run, fails):
    before = contents(run)
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2, *DIVERGING], "became nan in epoch 2",
          "--learning_rate", "--amp off", "The checkpoints of the epochs before are kept")
    after = contents(run)
    assert after.keys() == before.keys() and after[Path("config.json")] == before[Path("config.json")]
    assert load(run / "last.pth")["epoch"] == load(run / "best.pth")["epoch"] == 1
    assert load(run / "best.pth")["config"] == load(run / "last.pth")["config"]  # not the flags that failed


@pytest.mark.usefixtures("heeding_signals")
@pytest.mark.parametrize("moment, signal_number", [
    ("load_splits", signal.SIGTERM), ("load_splits", signal.SIGINT), ("keep_features", signal.SIGINT),
    ("train_one_epoch", signal.SIGINT), ("evaluate", signal.SIGINT),
])
def test_stopping_a_new_run_before_its_first_epoch(moment, signal_number, tiny, monkeypatch, fails):
    def stop(*args, **options):
        signal.raise_signal(signal_number)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(train, moment, stop)
    words = [f"stopped by {signal_number.name}", "start again"]
    fails(train.main, arguments(tiny, "run"), *words, status=128 + signal_number)
    assert not Path("run").exists()


@pytest.mark.parametrize("moment", ["load_splits", "report_best"])
def test_stopping_a_resumed_run_at_any_moment_leaves_its_checkpoints(moment, run, monkeypatch, fails):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, moment, stop)
        argv = ["--resume", run / "last.pth", "--num_epochs", 2]
        fails(train.main, argv, "go on with", f"--resume {run / 'last.pth'}", status=130)
    assert load(run / "last.pth")["epoch"] == (2 if moment == "report_best" else 1)
    assert load(run / "best.pth")["epoch"] >= 1


def test_a_new_best_epoch_makes_the_report_on_the_one_before_void(run, monkeypatch):
    edit(run / "last.pth", best=load(run / "last.pth")["best"] | {"best_dice": 0.0})

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "report_best", stop)
        resume(run / "last.pth", "--num_epochs", 2)
    assert load(run / "best.pth")["epoch"] == 2
    assert not any((run / name).exists() for name in train.REPORT_FILES)
    resume(run / "last.pth")
    assert all((run / name).exists() for name in train.RUN_FILES)


def test_a_run_resumed_with_another_loss_says_so(run, capsys):
    edit(run / "last.pth", config=load(run / "last.pth")["config"] | {"loss": "hinge"})
    resume(run / "last.pth", "--num_epochs", 2)
    assert "had another loss; now it is cross entropy + soft Dice" in capsys.readouterr().out


@pytest.mark.usefixtures("heeding_signals")
def test_stopping_while_worker_processes_start(tiny, tmp_path, fails):
    """Python drops what a signal's handler raises in the middle of a fork."""
    pending = [signal.SIGTERM]
    os.register_at_fork(before=lambda: pending and os.kill(os.getpid(), pending.pop()))
    argv = arguments(tiny, tmp_path / "run", "--no_cache", "--num_workers", 2)
    fails(train.main, argv, "stopped by SIGTERM", status=143)
    assert not pending


def test_a_clean_up_that_fails_adds_no_traceback(tiny, tmp_path, fails, monkeypatch):
    for name in ("unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, refuse(errno.EACCES))
    fails(train.main, arguments(tiny, tmp_path / "run", *DIVERGING), "became nan")
    assert (tmp_path / "run" / "config.json").exists()  # it did fail


# --- The best epoch -----------------------------------------------------------------------------------------


MARK = torch.full((20,), 7.0)  # the old best epoch's biases, which no training gives


@pytest.fixture
def unbeatable(run):
    """A last.pth whose old best epoch scored more than any can."""
    edit(run / "last.pth", best_dice=2.0, best={"epoch": 1, "model": {"out.bias": MARK}})
    return run / "last.pth"


def test_an_old_best_that_no_epoch_beats_stays(unbeatable, run, capsys):
    resume(unbeatable)
    best, last = load(run / "best.pth"), load(unbeatable)
    assert best["epoch"] == 1 and best["best_dice"] == last["best_dice"] == 2 and last["epoch"] == 2
    assert torch.equal(best["model"]["out.bias"], MARK) and not torch.equal(last["model"]["out.bias"], MARK)
    assert torch.equal(last["best"]["model"]["out.bias"], MARK)
    assert "sought anew" not in capsys.readouterr().out


def test_a_copied_last_pth_alone_resumes_beside_itself_and_leaves_a_right_best_pth(unbeatable, tmp_path):
    """And config.json and the rest."""
    (tmp_path / "copied").mkdir()
    shutil.copy(unbeatable, tmp_path / "copied")
    before = load(unbeatable)["model"]
    resume(tmp_path / "copied" / "last.pth")
    best = load(tmp_path / "copied" / "best.pth")["model"]
    assert torch.equal(best.pop("out.bias"), MARK) and len(best) == len(before) - 1
    assert all(torch.equal(best[name], before[name]) for name in best)
    assert sorted(path.name for path in (tmp_path / "copied").iterdir()) == sorted(train.RUN_FILES)


def test_data_that_only_moved_keep_the_old_best(unbeatable, run, tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "moved")
    resume(unbeatable, "--data_dir", tmp_path / "moved")
    assert load(run / "best.pth")["epoch"] == 1 and "sought anew" not in capsys.readouterr().out


def one_more(folder):
    shutil.copy(folder / "val" / "1.jpg", folder / "val" / "2.jpg")


def another_name(folder):
    (folder / "val" / "1.jpg").rename(folder / "val" / "2.jpg")


def another_picture(folder):
    shutil.copy(folder / "train" / "1.jpg", folder / "val" / "1.jpg")


@pytest.mark.parametrize("change", [another_name, another_picture])
def test_on_other_validation_composites_the_best_is_sought_anew(change, unbeatable, run, own_tiny, capsys):
    change(own_tiny)
    resume(unbeatable, "--data_dir", own_tiny)
    best, last = load(run / "best.pth"), load(unbeatable)
    assert best["epoch"] == 2 and best["best_dice"] == last["best_dice"] < 1
    assert all(torch.equal(best["model"][name], last["model"][name]) for name in best["model"])
    assert last["best"]["model"] == {} and "the best epoch is sought anew" in capsys.readouterr().out


def test_with_other_void_colours_the_best_is_sought_anew(unbeatable, run, edit_classes, monkeypatch, capsys):
    """The labels mean something else, though no class has changed."""
    monkeypatch.setattr(dataset, "VOID_COLORS", dataset.VOID_COLORS | {"ego vehicle": (10, 200, 10)})
    edit_classes(dataset.CLASSES)
    resume(unbeatable)
    assert load(run / "best.pth")["epoch"] == 2 and "sought anew" in capsys.readouterr().out


def test_at_another_image_size_the_best_is_sought_anew(unbeatable, run):
    """best.pth says at which size its weights are to be used, and they scored at another."""
    resume(unbeatable, "--image_size", 96)
    best = load(run / "best.pth")
    assert best["config"]["image_size"] == 96 and best["epoch"] == 2


def test_a_report_on_other_data_without_a_new_epoch_does_not_invent_a_best(run, own_tiny, fails):
    (run / "per_class.csv").unlink()
    one_more(own_tiny)
    before = (run / "best.pth").read_bytes()
    argv = ["--resume", run / "last.pth", "--data_dir", own_tiny]
    fails(train.main, argv, "last.pth: the run has finished", "other data", "--num_epochs")
    assert (run / "best.pth").read_bytes() == before


def test_a_report_after_a_kill_writes_the_last_row_of_the_history_too(run):
    """kill -9 between last.pth and history.csv of the last epoch."""
    history = (run / "history.csv").read_text()
    for name in ("history.csv", "curves.png", "predictions.png", "confusion_matrix.png", "per_class.csv"):
        (run / name).unlink()
    train.main(["--resume", str(run / "last.pth")])
    assert (run / "history.csv").read_text() == history
    assert sorted(path.name for path in run.iterdir()) == sorted(train.RUN_FILES)


@pytest.mark.parametrize("more", [[], DIVERGING], ids=["works", "fails"])
def test_a_renamed_last_pth_does_not_touch_what_lies_beside_it(more, run, tmp_path):
    """A folder where somebody collects checkpoints: its best.pth may be of quite another run."""
    (run / "last.pth").rename(run / "mine.pth")
    before = contents(run)
    with pytest.raises(SystemExit) as end:
        resume(run / "mine.pth", *more)
    assert end.value.code == 1
    after = contents(run)
    assert {name: after.get(name) for name in before} == before


def test_a_copy_of_an_earlier_epoch_does_not_overwrite_the_later_ones(run, fails):
    """cp last.pth epoch1.pth, train on, and then try something from epoch 1."""
    shutil.copy(run / "last.pth", run / "epoch1.pth")
    resume(run / "last.pth")
    before = contents(run)
    fails(train.main, ["--resume", run / "epoch1.pth", "--num_epochs", 2], "epoch1.pth", "--output_dir")
    assert contents(run) == before


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


@pytest.mark.parametrize("name", ["per_class.csv", "predictions.png"])
def test_a_report_that_cannot_be_written_is_missed_with_a_warning(name, run, capsys):
    for report in ("per_class.csv", "confusion_matrix.png", "predictions.png"):
        (run / report).unlink()
    (run / name).mkdir()
    train.main(["--resume", str(run / "last.pth")])
    captured = capsys.readouterr()
    warnings = captured.err.splitlines()
    assert len(warnings) == 1 and name in warnings[0]
    assert str(run / name) not in captured.out.partition("Written:")[2]


ADVICE = [
    (errno.ENOSPC, "free some space"),
    (errno.EDQUOT, "quota"),
    (errno.EACCES, "a folder you can write to"),
    (errno.EPERM, "a folder you can write to"),
    (errno.EROFS, "a folder you can write to"),
]


@pytest.mark.parametrize("number, advice", ADVICE, ids=lambda value: errno.errorcode.get(value, ""))
def test_a_file_that_cannot_be_written_ends_in_advice_that_fits(number, advice, tmp_path, monkeypatch):
    utils.write_file(tmp_path / "last.pth", b"old")
    monkeypatch.setattr(os, "fsync", refuse(number))
    expected = f"last.pth could not be written.*{os.strerror(number)}.*{advice}"
    with pytest.raises(utils.UserError, match=expected):
        utils.write_file(tmp_path / "last.pth", b"new")
    assert contents(tmp_path) == {Path("last.pth"): b"old"}


def test_a_checkpoint_that_cannot_be_written_ends_the_run(run, fails, monkeypatch):
    monkeypatch.setattr(utils, "RENAME_SECONDS", 0)
    before = (run / "last.pth").read_bytes()
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC, only="last.pth"))
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2], "last.pth could not be written",
          "free some space", "What was there before is whole")
    assert (run / "last.pth").read_bytes() == before and not list(run.glob(".*"))


@pytest.mark.parametrize("number, advice", ADVICE, ids=lambda value: errno.errorcode.get(value, ""))
def test_a_new_folder_that_cannot_be_written_ends_in_fitting_advice(number, advice, tiny, fails, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(number))
    run = Path("run").absolute()
    fails(train.main, arguments(tiny, run), run, os.strerror(number), advice)
    assert contents(run.parent) == {}


def test_a_new_folder_without_room_for_its_config_is_gone_again(tiny, tmp_path, fails, monkeypatch):
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, refuse(errno.ENOSPC, only="config.json"))
    argv = arguments(tiny, tmp_path / "run")
    fails(train.main, argv, "config.json could not be written", "free some space")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_fsync_is_fine(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(number))
    utils.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_run_on_a_file_system_without_fsync_links_and_locks_is_fine(tiny, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    monkeypatch.setattr(os, "link", refuse(errno.ENOTSUP))
    monkeypatch.setattr(utils, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse(errno.ENOLCK)))
    train.main(arguments(tiny, tmp_path / "run"))
    fails(train.main, arguments(tiny, tmp_path / "run"), "holds a run already")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(train.RUN_FILES)


def test_a_rename_that_is_refused_for_a_moment_is_tried_again(tiny, tmp_path, monkeypatch):
    """As virus scanners, indexers and network drives refuse it."""
    refused = []

    def replace(source, target):
        if Path(target).suffix == ".pth" and refused.count(target) < 3:
            refused.append(target)
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    train.main(arguments(tiny, tmp_path / "run"))
    assert {path.name for path in refused} == {"best.pth", "last.pth"} and len(refused) == 6
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 1 and not list((tmp_path / "run").glob(".*"))


def test_a_folder_that_is_removed_while_training_ends_in_a_line(run, fails, monkeypatch):
    def train_and_remove(*args):
        shutil.rmtree(run)
        return real(*args)

    real = train.train_one_epoch
    monkeypatch.setattr(utils, "RENAME_SECONDS", 0)
    monkeypatch.setattr(train, "train_one_epoch", train_and_remove)
    fails(train.main, ["--resume", run / "last.pth", "--num_epochs", 2], run, "the folder is gone")


def test_a_disk_too_full_for_the_first_checkpoint_leaves_the_folder_free(tiny, tmp_path, fails):
    """As full as it gets for root too: no file may grow beyond a megabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        fails(train.main, arguments(tiny, tmp_path / "run"), "best.pth could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run").exists()


def a_file_above(folder):
    (folder / "file").write_text("")
    return folder / "file" / "run"


def the_file_itself(folder):
    (folder / "file").write_text("")
    return folder / "file"


def a_link_to_nowhere(folder):
    (folder / "link").symlink_to(folder / "unmounted")
    return folder / "link"


def a_link_to_nowhere_above(folder):
    return a_link_to_nowhere(folder) / "run"


def a_long_name(folder):
    return folder / ("x" * 300)


@pytest.mark.parametrize("make", [
    a_file_above, the_file_itself, a_link_to_nowhere, a_link_to_nowhere_above, a_long_name,
])
def test_output_folders_that_cannot_be_made(make, tiny, tmp_path, fails):
    output = make(tmp_path)
    fails(train.main, arguments(tiny, output), output)


@pytest.mark.parametrize("make", [
    lambda: Path("runs").write_text(""),
    lambda: Path("runs").symlink_to("unmounted"),
], ids=["a file", "a link to nowhere"])
def test_runs_that_is_no_folder(make, tiny, fails, monkeypatch):
    def mkdir(path, *options):
        tried.append(path)
        assert len(tried) < 100, "it looks for a free name for ever"
        real(path, *options)

    tried, real = [], os.mkdir
    make()
    monkeypatch.setattr(os, "mkdir", mkdir)
    fails(train.main, ["--data_dir", tiny, "--num_epochs", 1, *SMALL], "runs", "--output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
@pytest.mark.parametrize("mode, name", [(0o500, "locked/run"), (0o500, "locked"), (0, "locked/run")])
def test_folders_without_permission_are_named(mode, name, tiny, tmp_path, fails):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(mode)
    fails(train.main, arguments(tiny, tmp_path / name), tmp_path / name, "choose a folder you can write to")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
@pytest.mark.parametrize("name", ["train/2.jpg", "val"])
def test_data_without_permission_are_named(name, own_tiny, tmp_path, fails):
    (own_tiny / name).chmod(0)
    fails(train.main, arguments(own_tiny, tmp_path / "run"), name, "ermission")


# --- Memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def out_of_memory(monkeypatch):
    """The device's memory is gone as soon as logits are computed."""
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models.EfficientSegNet, "decode", fail)
    monkeypatch.setattr(metrics, "score_stretched", fail)


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),  # another program has taken it all
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried "
                 "to allocate 68719476736 bytes."),  # Windows
], ids=["Python", "torch", "driver", "Windows"])
@pytest.mark.parametrize("place", ["to", "decode"])
def test_memory_runs_out_in_other_places_too(error, place, tiny, finished, fails):
    def fail(*args, **options):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.EfficientSegNet, place, fail)
        fails(train.main, arguments(tiny, "run", "--batch_size", 6), "memory", "try --batch_size 3")
        argv = [tiny / "val" / "1.jpg", "--checkpoint", finished / "best.pth", "--output", "mask.png"]
        fails(predict.main, argv, "out of memory", "try --device cpu, or again")


def test_out_of_memory_names_a_batch_that_may_fit(out_of_memory, tiny, tmp_path, fails):
    argv = arguments(tiny, tmp_path / "run", "--batch_size", 6)
    fails(train.main, argv, "ran out of memory", "--batch_size 6", "try --batch_size 3")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_with_one_image_names_a_smaller_size(out_of_memory, tiny, tmp_path, fails):
    fails(train.main, arguments(tiny, tmp_path / "run", "--batch_size", 1), "try --image_size 32")


def test_out_of_memory_with_the_smallest_images_names_nothing_impossible(out_of_memory, tiny, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(tiny, "run", "--batch_size", 1, "--image_size", 32))
    error = capsys.readouterr().err
    assert "ran out of memory" in error and "--image_size 0" not in error


def test_out_of_memory_beside_features_on_the_gpu_names_no_cache(out_of_memory, tiny, fails, monkeypatch):
    real = train.keep_features
    monkeypatch.setattr(train, "keep_features", lambda *args: ["cuda", real(*args)[1]])
    fails(train.main, arguments(tiny, "run"), "try --no_cache", "or --batch_size 2")


def test_out_of_memory_in_an_evaluation_names_no_flag_that_it_refuses(out_of_memory, finished, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--evaluate", str(finished / "best.pth"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and "ran out of memory" in error and error.count("\n") == 1
    assert "--batch_size" not in error and "--no_cache" not in error


# --- Composites from the original download ------------------------------------------------------------------


@pytest.fixture
def download(tmp_path):
    """An original download of one frame a split, with photos twice as wide as high."""
    photo, label_rgb = map(Image.fromarray, draw_scene(7))
    for split in ("train", "val"):
        for kind, suffix, picture in (("leftImg8bit", "leftImg8bit", photo),
                                      ("gtFine", "gtFine_color", label_rgb)):
            folder = tmp_path / "cityscapes" / kind / split / "aachen"
            folder.mkdir(parents=True)
            small = picture.resize((256, 128), Image.Resampling.NEAREST)
            small.save(folder / f"aachen_000000_000019_{suffix}.png")
    return tmp_path / "cityscapes"


def make_composites(download, size, output=None):
    dataset.main([str(download), "--output", str(output or download.parent / "data"), "--size", str(size)])


def test_composites_of_two_sizes_in_one_folder(download, fails):
    make_composites(download, 64)
    before = contents(download.parent / "data")
    argv = [download, "--output", download.parent / "data", "--size", 128]
    fails(dataset.main, argv, "128x64", "256x128", "--output")
    assert contents(download.parent / "data") == before


def test_composites_that_are_there_are_counted_again(download, capsys):
    for _ in range(2):
        make_composites(download, 64)
        assert "2 composites" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-1", "1"])
def test_composites_of_no_size(size, download, fails):
    argv = [download, "--output", download.parent / "data", "--size", size]
    fails(dataset.main, argv, "--size", size, status=2)
    assert not (download.parent / "data").exists()


def no_photos(download):
    shutil.rmtree(download / "leftImg8bit")


def no_label(download):
    shutil.rmtree(download / "gtFine" / "val")


def damaged_photo(download):
    (photo,) = (download / "leftImg8bit" / "val" / "aachen").iterdir()
    photo.write_bytes(b"damaged")


def a_file_as_output(download):
    (download.parent / "data").write_text("")


def damaged_composite(download):
    (download.parent / "data" / "train").mkdir(parents=True)
    (download.parent / "data" / "train" / "aachen_000000_000019.png").write_bytes(b"damaged")


@pytest.mark.parametrize("damage, words", [
    (shutil.rmtree, ["leftImg8bit_trainvaltest.zip"]),
    (no_photos, ["leftImg8bit_trainvaltest.zip"]),
    (no_label, ["gtFine_color.png"]),
    (damaged_photo, ["leftImg8bit.png", "replace or remove it"]),
    (a_file_as_output, ["data"]),
    (damaged_composite, ["aachen_000000_000019.png"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_downloads_that_are_not_as_expected(damage, words, download, fails):
    damage(download)
    fails(dataset.main, [download, "--output", download.parent / "data", "--size", 64], *words)
    assert not list(download.parent.glob("data/*/.*"))


@pytest.mark.parametrize("argv, words", [
    (["--size", "large"], ["--size", "large"]),
    (["--size", "2.5"], ["--size", "2.5"]),
    (["--sise", "64"], ["--sise"]),
])
def test_wrong_arguments_of_dataset(argv, words, download, capsys):
    with pytest.raises(SystemExit) as end:
        dataset.main([str(download), "--output", str(download.parent / "data"), *argv])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and all(word in line for word in words), line
    assert not (download.parent / "data").exists()
