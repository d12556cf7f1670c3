"""pytest --repro "Case(...)" runs this and nothing else."""

from support.check import check_case


def test_repro(case, request):
    check_case(case, request.config.getoption("backend") or "cpu")
