"""The rendezvous port of a SLURM job."""

import socket

from maestro_scale.cluster.port import choose_port, main


def test_the_port_is_that_of_the_job_or_the_next_free_one(capsys):
    first = choose_port(123_456)
    assert first == 10_000 + 123_456 % 20_000  # no other job of this machine uses it
    with socket.socket() as other:
        other.bind(("", first))
        other.listen()
        second = choose_port(123_456)
        assert second == 10_000 + (123_456 + 211) % 20_000
        assert main(["143456"]) == 0  # an id whose first port is the same
        assert capsys.readouterr().out == f"{second}\n"
