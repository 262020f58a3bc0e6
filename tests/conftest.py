"What several tests need."
import logging, os, sys

# Two processes test at once, on cores that others may use: one thread each, and threads that wait must not spin. OpenMP reads this when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import pytest, torch


@pytest.fixture
def fake_cuda():
    "Tensors may pretend to be on a GPU without one; torch 2.6 asks for the driver all the same, and the test is skipped"
    from torch._subclasses.fake_tensor import FakeTensorMode
    try:
        with FakeTensorMode(): ~torch.stack([torch.zeros((), device='cuda')]*2).isfinite()
    except RuntimeError as e: pytest.skip(f'torch {torch.__version__} cannot pretend to have a GPU: {str(e).splitlines()[0]}')


def _quiet():
    log = logging.getLogger('distillbook')
    log.handlers[:],log.propagate = [],True
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def as_it_was():
    "Commands that run in this process set up the log and draw pictures; no other test may see that"
    _quiet()
    yield
    _quiet()
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
