import pytest

from hmde_dist.topology import complete_environment, first_host

WANTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def completed(**given: str) -> dict[str, str]:
    env = dict(given)
    complete_environment(env)
    return env


def test_the_deepspeed_launcher_lacks_only_the_local_world_size():
    env = completed(
        RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1", CROSS_RANK="1"
    )
    assert [env[name] for name in WANTED] == ["3", "4", "1", "2", "a", "1"]


def test_torchrun_is_left_as_it_is():
    given = dict(zip(WANTED, ["3", "4", "1", "2", "a", "1"], strict=True))
    assert completed(**given) == given


def test_plain_python_is_a_world_of_one_on_a_free_port():
    env = completed()
    assert [env[name] for name in WANTED[:5]] == ["0", "1", "0", "1", "127.0.0.1"]
    assert int(env["MASTER_PORT"]) > 1024


SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_srun_gives_rank_world_and_the_tasks_of_this_node():
    env = completed(**SRUN)
    assert [env[name] for name in WANTED[:5]] == ["6", "7", "0", "1", "gpu03"]
    assert (
        completed(**SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "3"
    )


def test_ranks_of_a_step_share_a_port_that_other_jobs_and_restarts_do_not():
    port = completed(**SRUN)["MASTER_PORT"]
    assert completed(**SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == port
    others = [SRUN | {"SLURM_JOB_ID": "78"}, SRUN | {"SLURM_STEP_ID": "1"}, SRUN | {"SLURM_RESTART_COUNT": "1"}]
    assert port not in [completed(**other)["MASTER_PORT"] for other in others]


def test_python_inside_an_allocation_without_srun_is_a_world_of_one():
    """The batch script itself has no variables of a step."""
    assert completed(SLURM_JOB_ID="77", SLURM_PROCID="0", SLURM_NTASKS="8")["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9],b1", "gpu03"),
        ("a1,a2", "a1"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack2-n[010-020]", "rack2-n010"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, first):
    assert first_host(nodelist) == first
