"What several tests need."
import logging, os, sys

# Two processes test at once, on cores that others may use: one thread each, and threads that wait must not spin. OpenMP reads this when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
import pytest, torch


def pytest_addoption(parser):
    parser.addoption('--device', choices=['cpu','cuda'], default='cpu', help='where to test: on the CPU, as if there were no GPU (default), or on a GPU, where the library then computes whatever is not told otherwise')

def pytest_configure(config):
    if config.getoption('device')=='cpu': os.environ['CUDA_VISIBLE_DEVICES'] = os.environ['HIP_VISIBLE_DEVICES'] = '-1' # For the processes that tests start, too
    elif not torch.cuda.is_available(): raise pytest.UsageError(f'--device cuda: PyTorch {torch.__version__} sees no GPU')


@pytest.fixture(scope='module')
def gpu(request):
    "A GPU: with --device cuda the real one, else one that is pretended. For as long as tests of this module run"
    from pretend_gpu import pretend_gpu
    if request.config.getoption('device')=='cuda': yield torch.cuda.get_device_name()
    else:
        with pretend_gpu(): yield torch.cuda.get_device_name()


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
