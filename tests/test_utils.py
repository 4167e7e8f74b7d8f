"""utils.py: arguments, devices, files that are whole at every moment, pictures."""
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from utils import UserError


@pytest.fixture
def rank_2_of_4(monkeypatch):
    """What torchrun tells a process."""
    variables = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def make_parser():
    parser = utils.ArgumentParser(prog="tool.py")
    parser.add_argument("--batch_size", type=utils.whole_number(1), default=4)
    parser.add_argument("--image_size", type=utils.whole_number(32, multiple=32), default=64)
    parser.add_argument("--seed", type=utils.whole_number(0, 2**63 - 1), default=0)
    parser.add_argument("--learning_rate", type=utils.positive_float, default=1e-3)
    return parser


@pytest.mark.parametrize("arguments, message", [
    (["--batch_sise", "3"], "unknown argument --batch_sise; did you mean --batch_size?"),
    (["--batch", "3"], "unknown argument --batch"),
    (["--zzz"], "unknown argument --zzz (see --help)"),
    (["--batch_size", "0"], "0: expected a whole number of 1 or more"),
    (["--batch_size", "2.5"], "2.5: expected a whole number"),
    (["--image_size", "100"], "100: expected a multiple of 32 of 32 or more"),
    (["--image_size", "-32"], "-32: expected a multiple of 32"),
    (["--seed", "-1"], "-1: expected a whole number of 0 or more, at most 9223372036854775807"),
    (["--seed", str(2**64)], "expected a whole number of 0 or more, at most"),
    (["--seed", "9" * 5000], "expected a whole number of 0 or more, at most"),
    (["--learning_rate", "-1"], "-1: expected a number above 0"),
    (["--learning_rate", "nan"], "nan: expected a number above 0"),
    (["--learning_rate", "fast"], "fast: expected a number above 0"),
])
def test_wrong_arguments_end_in_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_whole_numbers_within_their_range_are_taken():
    args = make_parser().parse_args(["--image_size", "96", "--seed", str(2**63 - 1), "--batch_size", " 3 "])
    assert (args.image_size, args.seed, args.batch_size) == (96, 2**63 - 1, 3)


def test_user_errors_become_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as end, utils.user_errors(KeyError):
        raise UserError("first\nsecond")
    assert end.value.code == 1 and capsys.readouterr().err.endswith("error: first second\n")
    with pytest.raises(ZeroDivisionError), utils.user_errors(KeyError):  # a bug keeps its traceback
        1 / 0


@pytest.mark.parametrize("capability, architectures, served", [
    ((6, 1), ["sm_50", "sm_60", "sm_70"], True),  # GTX 1080 on torch 2.7: sm_60 serves 6.1
    ((6, 1), ["sm_75", "sm_80", "sm_90"], False),  # and on torch 2.8
    ((8, 0), ["sm_75", "sm_86"], False),  # a higher minor version does not serve a lower card
    ((9, 0), ["sm_80", "sm_90a"], True),
    ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for later cards
])
def test_builds_serve_equal_major_and_not_higher_minor(capability, architectures, served):
    if served:
        utils.check_gpu_architecture("card", capability, architectures)
    else:
        with pytest.raises(UserError, match="pip install"):
            utils.check_gpu_architecture("card", capability, architectures)


def test_pascal_on_a_newer_torch_is_told_which_torch_to_install():
    with pytest.raises(UserError, match=r"6\.1.*torch==2\.7\.1 torchvision==0\.22\.1"):
        utils.check_gpu_architecture("GeForce GTX 1080", (6, 1), ["sm_75", "sm_90"])


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99", "gpu", "meta", "mps"])
def test_devices_that_are_not_here_are_refused(name):
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name in ("cuda", "cuda:0") and has_cuda or name == "mps" and has_mps:
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=f"--device {name}"):
        utils.select_device(name)


def test_torchrun_on_a_mac_takes_the_cpu(rank_2_of_4, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.select_device("auto").type == "cpu"
    monkeypatch.delenv("RANK")
    assert utils.select_device("auto").type == "mps"


@pytest.mark.parametrize("capability, dtype", [
    ((6, 1), None), ((7, 0), torch.float16), ((7, 5), torch.float16),
    ((8, 6), torch.bfloat16), ((9, 0), torch.bfloat16),
])
def test_auto_precision_is_what_the_card_is_fast_at(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    assert utils.select_amp("auto", torch.device("cuda:0"))[0] is dtype
    assert utils.select_amp("off", torch.device("cuda:0"))[0] is None


def test_a_gtx_16xx_runs_in_float32_though_its_capability_is_a_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1660 Ti")
    assert utils.select_amp("auto", torch.device("cuda:0")) == (None, "GTX 16xx is known for NaN in fp16")


@pytest.mark.parametrize("flags, dtype", [
    ("fpu avx2 avx512f avx512_bf16 vnni", torch.bfloat16),
    ("fpu avx2 amx_bf16 amx_tile", torch.bfloat16),
    ("fpu avx2 avx512f", None),
    (None, None),  # not Linux
])
def test_auto_precision_on_the_cpu_follows_its_instructions(flags, dtype, tmp_path, monkeypatch):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"model name\t: CPU\nflags\t\t: {flags}\n")
    has_bf16 = utils.cpu_has_bf16(tmp_path / "cpuinfo")
    monkeypatch.setattr(utils, "cpu_has_bf16", lambda: has_bf16)
    assert utils.select_amp("auto", torch.device("cpu"))[0] is dtype


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    utils.write_file(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        utils.write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pth"]


def test_temporary_names_are_each_process_s_own(tmp_path, monkeypatch):
    first = utils.temporary_name(tmp_path / "last.pth")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert first != utils.temporary_name(tmp_path / "last.pth") and first.parent == tmp_path


def test_a_locked_folder_is_one_process_s_at_a_time(tmp_path):
    with utils.locked_dir(tmp_path / "run", "--output_dir"):
        with pytest.raises(UserError, match="--output_dir .*run: another process is at work there"):
            with utils.locked_dir(tmp_path / "run", "--output_dir"):
                pass
    with utils.locked_dir(tmp_path / "run", "--output_dir"):
        assert os.listdir(tmp_path / "run") == []


def test_an_exclusive_write_replaces_nothing(tmp_path):
    utils.write_file(tmp_path / "config.json", b"one", exclusive=True)
    with pytest.raises(UserError, match="another process wrote it first"):
        utils.write_file(tmp_path / "config.json", b"two", exclusive=True)
    assert (tmp_path / "config.json").read_bytes() == b"one" and os.listdir(tmp_path) == ["config.json"]


def test_new_folders_get_a_number_where_their_name_is_taken(tmp_path):
    made = [utils.make_new_dir(tmp_path / "runs" / "now").name for _ in range(3)]
    assert made == ["now", "now-2", "now-3"]


def test_a_rank_that_has_not_met_the_others_yet_says_which_it_is(rank_2_of_4, capsys):
    with pytest.raises(SystemExit), utils.user_errors():
        raise UserError("there is no such file")
    assert capsys.readouterr().err.endswith("error: [rank 2] there is no such file\n")


def test_processes_of_one_machine_share_its_cores_and_memory(rank_2_of_4, monkeypatch):
    monkeypatch.setattr(utils, "available_memory", lambda: 12_000)
    share, cpus = utils.memory_share(), utils.available_cpus()
    monkeypatch.delenv("MASTER_ADDR")
    assert utils.memory_share() == 12_000  # the variables that are left are stray ones
    assert share == 3_000 and cpus == max(utils.available_cpus() // 4, 1)


def test_available_memory_is_what_the_machine_its_container_and_a_job_leave(tmp_path):
    def write(folder, **files):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("_", ".", 1)).write_text(text)

    assert utils.available_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write("proc", meminfo="MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n")
    assert utils.available_memory(tmp_path) == 8000 * 1024
    write("proc/self", cgroup="1:name=systemd:/\n")
    assert utils.available_memory(tmp_path) == 8000 * 1024
    used = {"memory_current": "3000000\n", "memory_stat": "anon 5\ninactive_file 1000000\n"}
    write("sys/fs/cgroup", memory_max="max\n", **used)
    assert utils.available_memory(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup", memory_max="5000000\n", **used)
    assert utils.available_memory(tmp_path) == 3_000_000
    write("proc/self", cgroup="1:name=systemd:/\n0::/slurm/job_7/task\n")
    write("sys/fs/cgroup/slurm/job_7/task", memory_max="max\n", **used)
    assert utils.available_memory(tmp_path) == 3_000_000
    write("sys/fs/cgroup/slurm/job_7", memory_max="4000000\n", **used)
    assert utils.available_memory(tmp_path) == 2_000_000


def test_stopping_works_outside_the_main_thread(capsys):
    statuses = []

    def work():
        try:
            with utils.stoppable():
                raise KeyboardInterrupt
        except SystemExit as end:
            statuses.append(end.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == [130] and "stopped by SIGINT; nothing was finished" in capsys.readouterr().err


def test_csv_keeps_six_digits_and_leaves_nan_empty(tmp_path):
    row = {"class": "traffic light", "dice": 0.123456789, "iou": float("nan"), "pixels": 12345678}
    utils.write_csv(tmp_path / "a.csv", [row])
    assert (tmp_path / "a.csv").read_text() == "class,dice,iou,pixels\ntraffic light,0.123457,,12345678\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file"):
        utils.make_dir(tmp_path / "file" / "below", "--output")


NAMES = [f"class {i}" for i in range(19)] + ["$_$"]  # no formula
COLORS = np.random.default_rng(0).integers(256, size=(20, 3), dtype=np.uint8)


def test_curves_are_drawn_and_say_at_which_size_they_were_scored(tmp_path):
    row = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "train_dice": 0.5, "val_dice": 0.4}
    figure = utils.plot_curves([row], 128)
    utils.save_figure(tmp_path / "curves.png", figure)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["train, at 128x128", "validation, at the composites' size"]
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5  # not an empty canvas


def test_predictions_are_drawn_for_labels_of_other_sizes_than_photos(tmp_path):
    label = np.arange(20, dtype=np.uint8).reshape(4, 5)
    sample = (np.zeros((8, 10, 3), np.uint8), label, label)
    utils.save_figure(tmp_path / "predictions.png", utils.plot_predictions([sample, sample], NAMES, COLORS))
    assert np.asarray(Image.open(tmp_path / "predictions.png")).std() > 5
