import re
import signal
import subprocess
import sys

import pytest

from hmde_dist.command import InputError, argument_parser, output_file, output_folder, progress


def run_script(body: str) -> subprocess.CompletedProcess:
    script = f"from hmde_dist.command import *\ndef main():\n    {body}\nrun_command(main)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code"), [("pass", 0), ("return 0", 0), ("return STOPPED", 75), ("return FAILED", 1), ("1 / 0", 1)]
)
def test_exit_code(body, code):
    assert run_script(body).returncode == code


def test_bad_input_is_one_line_and_code_2():
    done = run_script("print('so far'); raise InputError('no file\\n  called x')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "so far\n", "error: no file called x\n")


def test_a_bug_shows_its_traceback():
    assert "ZeroDivisionError" in run_script("1 / 0").stderr


def test_a_closed_pipe_ends_quietly():
    script = "from hmde_dist.command import *\ndef main():\n    while True: print('x' * 4096)\nrun_command(main)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_an_interrupt_ends_in_one_line():
    script = "from hmde_dist.command import *\ndef main():\n    print('here', flush=True)\n    time.sleep(60)\nrun_command(main)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"interrupted\n"
        assert process.wait(60) == 1


def test_help_ends_with_the_example_as_written(capsys):
    example = "python tools/x.py --out DIR \\\n      --more"
    with pytest.raises(SystemExit) as left:
        argument_parser("Does x.", example).parse_args(["--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.endswith(f"example:\n  {example}\n")


def test_unknown_argument_is_code_2():
    with pytest.raises(SystemExit) as left:
        argument_parser("Does x.", "x").parse_args(["--such"])
    assert left.value.code == 2


def test_progress_passes_everything_on(capsys):
    assert list(progress(range(3), desc="count")) == [0, 1, 2]
    assert "count" in capsys.readouterr().err


def test_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "a" / "b"
    with output_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
        assert folder.parent == target.parent, "a rename from elsewhere could cross file systems"
    assert (target / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt(), RuntimeError("x")])
def test_failed_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), output_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_taken_over(tmp_path):
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_empty_folder_survives_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("old"), lambda path: (path / "old").mkdir(parents=True)])
def test_target_with_content_is_refused_and_left_alone(tmp_path, make):
    target = tmp_path / "out"
    make(target)
    with pytest.raises(InputError, match=f"^{re.escape(str(target))} exists and is not empty: remove it"):
        with output_folder(target):
            pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == [target]
    assert target.is_file() or (target / "old").is_dir()


def test_folder_below_a_file_is_bad_input(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"), output_folder(tmp_path / "file" / "out"):
        pytest.fail("the block ran")


def test_file_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    for old, new in [(None, "grün 1"), ("grün 1", "綠 2")]:
        with output_file(path) as file:
            file.write(new)
            file.flush()
            assert (path.read_text(encoding="utf-8") if path.exists() else None) == old
        assert path.read_bytes() == new.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt()])
def test_failed_file_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), output_file(path, "wb") as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
