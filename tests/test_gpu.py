"""On a GPU: a step is one launch, the host never waits, features lie in its memory, all precisions learn."""
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

import dataset
import predict
import train
from conftest import FORKSERVER, HEIGHT, hurry, make_trainer, rows_of
from draw_demo import write_scenes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLAGS = ["--device", "cuda", "--encoder_weights", "none", "--image_size", "64"]
PRECISIONS = ["off", "fp16", *["bf16"] * (torch.cuda.is_available() and torch.cuda.is_bf16_supported())]
N_IMAGES = 24  # twelve steps of two: three before the capture, the capture, and replays


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    write_scenes(folder, {"train": N_IMAGES, "val": 7}, HEIGHT)
    return folder


@pytest.fixture(autouse=True)
def in_a_hurry_but_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with hurry():
        yield


@pytest.fixture
def run(many_scenes, tmp_path, capsys):
    """Train two epochs with some flags; the folder, the history and what was printed."""
    def call(name, *flags):
        argv = ["--data_dir", many_scenes, "--output_dir", tmp_path / name, "--num_epochs", 2,
                "--batch_size", 2, *FLAGS, *flags]
        train.main([str(argument) for argument in argv])
        return tmp_path / name, rows_of(tmp_path / name), capsys.readouterr()

    return call


def test_a_run_in_float32_is_that_of_a_cpu(run):
    histories = []
    for device in ("cuda", "cpu"):
        flags = ["--amp", "off", "--learning_rate", "3e-4", "--device", device]
        _, history, printed = run(device, *flags)
        assert "not possible" not in printed.out
        histories.append(history)
    for one, other in zip(*histories, strict=True):
        for name in ("train_loss", "train_dice", "val_loss", "val_dice"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=0.02), name


@pytest.mark.parametrize("finetune", [[], ["--finetune_encoder"]])
@pytest.mark.parametrize("more", [["--amp", name] for name in PRECISIONS] + [["--no_cache"]])
def test_every_way_to_train_is_one_launch_and_learns(run, finetune, more):
    _, history, printed = run("run", *finetune, *more)
    assert "not possible" not in printed.out
    assert ("kept in GPU memory" in printed.out) == ("--no_cache" not in more)
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])


make_gpu_trainer = partial(make_trainer, n_steps=20, device="cuda")


def make_batches(n_batches):
    """Noise, and how bright it is as label."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_batches):
        images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
        yield images.cuda(), (images.float().mean(1) / 13).to(torch.uint8).cuda()


def assert_moved_alike(one, other, before):
    """Weights went the same way from `before`, as far as AdamW does where a gradient is rounding alone."""
    with torch.no_grad():
        apart, moved = (sum(float((left - right).abs().sum()) for left, right in zip(one.parameters, others))
                        for others in (other.parameters, before))
    assert apart < 0.4 * moved
    states = [trainer.optimizer.state_dict()["state"].values() for trainer in (one, other)]
    assert [float(state["step"]) for state in states[0]] == [float(state["step"]) for state in states[1]]
    norm = "decoder1.conv_block.1.num_batches_tracked"
    assert one.network.state_dict()[norm] == other.network.state_dict()[norm]


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("amp", PRECISIONS)
def test_replayed_steps_are_those_taken_one_by_one(amp, finetune):
    replayed, one_by_one = make_gpu_trainer(finetune, amp), make_gpu_trainer(finetune, amp)
    before = [parameter.detach().clone() for parameter in replayed.parameters]
    one_by_one.update = one_by_one._update
    for trainer in (replayed, one_by_one):
        trainer.generator = torch.Generator("cuda").manual_seed(3) if finetune else None
        for images, labels in make_batches(10):
            trainer.step([images], labels)
    assert replayed.update.graph
    assert_moved_alike(replayed, one_by_one, before)
    ours, theirs = (trainer.scores.compute()["loss"] for trainer in (replayed, one_by_one))
    assert ours == pytest.approx(theirs, rel=1e-3)


def go_on_without_a_graph(finetune):
    """In a process of its own: torch's state after a capture that failed is not that before it."""
    with hurry():
        failed, plain = make_gpu_trainer(finetune), make_gpu_trainer(finetune)
        before = [parameter.detach().clone() for parameter in failed.parameters]
        plain.update = plain._update
        average_gradients = failed.average_gradients

        def wait_for_the_gpu():  # in the middle of a step
            average_gradients()
            failed.parameters[0].sum().item()

        failed.average_gradients = wait_for_the_gpu
        stream = torch.cuda.current_stream()
        for trainer in (failed, plain):
            for images, labels in make_batches(10):
                trainer.step([images], labels)
        assert not failed.update.graph and torch.cuda.current_stream() == stream
        assert_moved_alike(failed, plain, before)


@pytest.mark.parametrize("finetune", [False, True])
def test_a_step_that_cannot_be_captured_goes_on_as_it_is(finetune):
    process = FORKSERVER.Process(target=go_on_without_a_graph, args=(finetune,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("finetune", [False, True])
def test_the_host_does_not_wait_in_a_step(many_scenes, finetune):
    trainer = make_gpu_trainer(finetune)
    trainer.generator = torch.Generator("cuda").manual_seed(3) if finetune else None
    paths, _ = dataset.list_composites(many_scenes / "train")
    split = dataset.Split(paths, 64, 20, resize_labels=True, n_threads=2)
    split.keep(trainer.make_inputs, trainer.runtime.device, tqdm(disable=True))
    batches = split.batches([[i, i + 1] for i in range(0, N_IMAGES, 2)], trainer.runtime.device)
    for _ in range(train.GRAPH_WARMUP + 1):
        trainer.step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, labels in batches:
            trainer.step(inputs, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_goes_on_on_a_cpu_and_back(run):
    folder, history, _ = run("run", "--amp", "off")
    for device, n_epochs in (("cpu", 3), ("cuda", 4)):
        train.main(["--resume", str(folder / "last.pth"), "--num_epochs", str(n_epochs), "--device", device])
    losses = [float(row["train_loss"]) for row in rows_of(folder)]
    assert len(losses) == 4 and losses[3] < losses[1]


@pytest.mark.parametrize("finetune", [False, True])
def test_trainer_state_goes_on_where_it_was(finetune):
    batches = list(make_batches(10))
    whole, first, second = (make_gpu_trainer(finetune) for _ in range(3))
    before = [parameter.detach().clone() for parameter in whole.parameters]
    for images, labels in batches:
        whole.step([images], labels)
    for images, labels in batches[:5]:
        first.step([images], labels)
    second.load_state_dict(first.state_dict(), steps_done=5)
    for images, labels in batches[5:]:
        second.step([images], labels)
    assert_moved_alike(whole, second, before)


def test_features_that_do_not_fit_on_the_gpu_lie_in_host_memory(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    _, _, printed = run("run")
    assert "kept in host memory" in printed.out and "not possible" not in printed.out


def test_memory_that_runs_out_ends_in_a_line(many_scenes, tmp_path, fails):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total + 2**28 / total)
    try:
        argv = ["--data_dir", many_scenes, "--output_dir", tmp_path / "run", *FLAGS, "--image_size", "1024",
                "--batch_size", "16", "--finetune_encoder"]
        fails(train.main, argv, "memory ran out", "--batch_size")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_masks_are_those_of_a_cpu(run, many_scenes, tmp_path):
    folder, _, _ = run("run")
    masks = {}
    for device in ("cuda", "cpu"):
        output = tmp_path / f"masks {device}"
        predict.main([str(many_scenes / "val"), "--composite", "--checkpoint", str(folder / "best.pth"),
                      "--output", str(output), "--device", device])
        masks[device] = [np.asarray(Image.open(path)) for path in sorted(output.glob("*.png"))]
    agreeing = [np.mean(left == right) for left, right in zip(masks["cuda"], masks["cpu"], strict=True)]
    assert len(agreeing) == 7 and min(agreeing) > 0.9
