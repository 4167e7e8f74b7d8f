"""utils.py: arguments, errors, devices, memory, files that are whole at every moment, pictures."""
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from conftest import FORKSERVER
from utils import UserError, check_gpu_architecture


@pytest.fixture
def rank_2_of_4(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("2", "2", "4", "4", "127.0.0.1", "1")):  # as torchrun says
        monkeypatch.setenv(name, value)


def parse(*argv):
    parser = utils.ArgumentParser(prog="tool.py")
    parser.add_argument("--size", type=utils.number(int, 64, 8192, multiple=32))
    parser.add_argument("--rate", type=utils.number(float, 1e-37, 1e37))
    parser.add_argument("--device", type=utils.device_name)
    parser.add_argument("--folder", type=utils.file_path)
    return parser.parse_args(argv)


@pytest.mark.parametrize("argv, message", [
    (["--siz", "64"], "--siz"),  # no abbreviations: tomorrow's flag may begin alike
    (["--size", "100"], "100: expected a multiple of 32 of 64 to 8192"),
    (["--rate", "nan"], "nan: expected a number of 1e-37 to 1e+37"),
    (["--device", "gpu"], "gpu: expected auto, cpu, cuda, cuda:N or mps"),
    (["--folder", ""], "is empty"),
])
def test_wrong_arguments_end_in_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_arguments_are_anything_that_str_makes_and_paths_know_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parse("--size", 96, "--rate", 1e-3, "--folder", Path("~/runs"))
    assert (args.size, args.rate, args.folder) == (96, 1e-3, Path("/home/someone/runs"))


@pytest.mark.parametrize("error, message", [
    (UserError("first\nsecond"), "first second"),
    (OSError(5, "Input/output error", "a.jpg"), "[Errno 5] Input/output error: 'a.jpg'"),  # as it stands
    (MemoryError(), "memory ran out; try a smaller --batch_size or --image_size, --no_cache"),
])
def test_what_a_user_can_put_right_becomes_one_line_and_status_1(error, message, capsys):
    error.__notes__ = ["go on with it: --resume last.pth"]
    with pytest.raises(SystemExit) as end, utils.one_line_errors("start again"):
        raise error
    line = capsys.readouterr().err
    assert end.value.code == 1 and f"error: {message}" in line
    assert line.endswith("; go on with it: --resume last.pth\n") and line.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), utils.one_line_errors("start again"):
        raise ZeroDivisionError


def test_a_rank_says_which_it_is_and_stops_in_a_thread_too(rank_2_of_4, capsys):
    def work():
        with pytest.raises(SystemExit, match="130"), utils.one_line_errors("start again"):
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:  # where no handler of signals can be set
        pool.submit(work).result()
    assert capsys.readouterr().err.endswith("error: [rank 2] stopped by SIGINT; start again\n")


def test_what_is_counted_is_one_epoch_or_two_epochs():
    assert [utils.counted(n, "epoch") for n in (0, 1, 2975)] == ["0 epochs", "1 epoch", "2,975 epochs"]


@pytest.mark.parametrize("capability, built_for, remedy", [
    ((6, 1), ["sm_60", "sm_70"], None),  # GTX 1080 on torch 2.7: sm_60 serves 6.1
    ((6, 1), ["sm_75", "sm_90"], "torch==2.7.1 torchvision==0.22.1"),  # and on a later one
    ((7, 0), ["sm_75", "sm_90"], "torch==2.7.1 torchvision==0.22.1"),  # V100
    ((8, 0), ["sm_75", "sm_86"], "--upgrade torch torchvision"),  # no lower card than it was built for
    ((9, 0), ["sm_80", "sm_90a"], None),
    ((12, 0), ["sm_90", "compute_90"], None),  # PTX is compiled for later cards
])
def test_a_card_that_this_torch_has_no_kernels_for_is_told_which_torch_has(capability, built_for, remedy):
    if not remedy:
        return check_gpu_architecture("card", capability, built_for)
    with pytest.raises(UserError, match=f"card has .*run: pip install {remedy}, or pass --device cpu"):
        check_gpu_architecture("card", capability, built_for)


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_torch_without_cuda_says_so_and_where_to_read_on(has_cuda, monkeypatch):
    monkeypatch.setattr(utils, "HAS_CUDA", has_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: .*pass --device cpu") as error:
        utils.select_device("cuda")
    line = str(utils.Runtime(torch.device("cpu"), None, "this CPU has no native bf16"))
    assert line.startswith("cpu (") and "float32 (this CPU has no native bf16)" in line
    for text in (line, str(error.value)):
        assert ("without CUDA" in text and "README's Install" in text) == (not has_cuda)


@pytest.mark.parametrize("name, capability, dtype", [
    ("GTX 1080", (6, 1), None), ("V100", (7, 0), torch.float16), ("RTX 3060", (8, 6), torch.bfloat16),
    ("GTX 1660 Ti", (7, 5), None),  # no tensor cores, and known for NaN
])
def test_auto_precision_is_what_the_card_is_fast_at(name, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA GeForce {name}")
    assert utils.select_amp("auto", torch.device("cuda:0"))[0] is dtype
    assert utils.select_amp("off", torch.device("cuda:0"))[0] is None


@pytest.mark.parametrize("flags, has_bf16", [
    ("fpu avx512_bf16 vnni", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx512f", False), (None, False),
])
def test_a_cpu_runs_in_bf16_if_its_instructions_have_it(flags, has_bf16, tmp_path):
    if flags:  # else not Linux
        (tmp_path / "cpuinfo").write_text(f"model name\t: CPU\nflags\t\t: {flags}\n")
    assert utils.cpu_has_bf16(tmp_path / "cpuinfo") == has_bf16


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n"}


def write_files(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("limit, used, folder, none", [
    ("memory.max", "memory.current", "", "max"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory/", "9223372036854771712"),
])
def test_free_memory_is_what_the_machine_and_its_container_leave(limit, used, folder, none, tmp_path):
    assert utils.free_memory(tmp_path) == float("inf")  # not Linux
    write_files(tmp_path, MEMINFO)
    files = {limit: none, used: "3000000\n", "memory.stat": "anon 5\ninactive_file 1000000\n"}
    write_files(tmp_path / "sys/fs/cgroup" / folder, files)
    assert utils.free_memory(tmp_path) == 8000 * 1024
    write_files(tmp_path / "sys/fs/cgroup" / folder, {limit: "5000000\n"})
    assert utils.free_memory(tmp_path) == 3_000_000  # the files that it keeps are given up in need


def test_processes_of_one_machine_share_its_cores_and_memory(rank_2_of_4, tmp_path, monkeypatch):
    write_files(tmp_path, MEMINFO)
    share, cpus = utils.free_memory(tmp_path), utils.available_cpus()
    monkeypatch.delenv("MASTER_ADDR")  # the variables that are left are stray ones
    assert utils.free_memory(tmp_path) == 4 * share == 8000 * 1024
    assert cpus == max(utils.available_cpus() // 4, 1)


def test_a_rename_that_is_refused_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As on Windows, where scanners hold files."""
    refused = Mock(side_effect=[PermissionError(13, "Permission denied")] * 2 + [None])
    monkeypatch.setattr(os, "replace", lambda *paths: refused() or Path(paths[0]).rename(paths[1]))
    utils.write_file(tmp_path / "last.pth", b"new")
    assert refused.call_count == 3 and (tmp_path / "last.pth").read_bytes() == b"new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_previous_file_whole_and_names_it(step, tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    utils.write_file(path, b"old")
    monkeypatch.setattr(os, step, Mock(side_effect=PermissionError(13, "Permission denied")))
    monkeypatch.setattr(utils, "RENAME_TRIES", 0)
    with pytest.raises(OSError, match="Permission denied.*last.pth"):
        utils.write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pth"]


def test_csv_keeps_six_digits_and_leaves_nan_empty(tmp_path):
    row = {"class": "traffic light", "dice": 0.123456789, "iou": float("nan"), "pixels": 12345678}
    utils.write_csv(tmp_path / "a.csv", [row])
    assert (tmp_path / "a.csv").read_text() == "class,dice,iou,pixels\ntraffic light,0.123457,,12345678\n"


def test_the_legend_of_the_curves_covers_none_and_says_at_which_size_they_were_scored():
    from matplotlib.figure import Figure
    row = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "train_dice": 0.5, "val_dice": 0.4}
    figure = Figure(layout="constrained")
    utils.draw_curves(figure, [row], 128)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == "train, at 128x128"
    for axes in figure.axes:
        assert not axes.get_legend() and not axes.get_tightbbox().overlaps(legend.get_window_extent())


def draw_in_a_notebook(path):
    """Body of a child process: predictions.png, of labels of another size than photos."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # which is not installed
    names, palette = [f"class {i}" for i in range(20)], np.arange(60, dtype=np.uint8).reshape(20, 3)
    label = np.arange(20, dtype=np.uint8).reshape(4, 5)
    samples = [(np.zeros((8, 10, 3), np.uint8), label, label)] * 2
    utils.write_picture(path, lambda figure: utils.draw_predictions(figure, samples, names, palette))


def test_pictures_are_drawn_whatever_backend_a_notebook_exports(tmp_path):
    process = FORKSERVER.Process(target=draw_in_a_notebook, args=(tmp_path / "predictions.png",))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert np.asarray(Image.open(tmp_path / "predictions.png")).std() > 5  # not an empty canvas
