"A few of each kind of hostile input: a result, or one line that says what is wrong. (tools/fuzz.py tries as many as one likes.)"
import logging
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
import hostile

COSTLY = dict(states=3, onnx=5, networks=8, labels=10, pages=10, values=15, checks=10, kept=10, places_to_read=12, places_to_write=6)

@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    return hostile.Sound(tmp_path_factory.mktemp('hostile'))

@pytest.mark.parametrize('name', hostile.KINDS)
def test_a_result_or_one_line(name, sound, monkeypatch):
    monkeypatch.chdir(sound.folder)
    logging.getLogger('distillbook').setLevel(logging.CRITICAL)
    @settings(derandomize=True, deadline=None, database=None, max_examples=COSTLY.get(name, 20), suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(rng): assert not (why := hostile.attempt(name, rng, sound)), why
    check()

def test_a_planted_fault_is_found(sound, monkeypatch):
    def broken(rng, sound): raise KeyError('planted')
    monkeypatch.setitem(hostile.KINDS, 'broken', broken)
    assert 'KeyError' in hostile.attempt('broken', None, sound)
    def in_two_lines(rng, sound): hostile.told(lambda: (_ for _ in ()).throw(type('Two', (hostile.UserError,), {'__str__': lambda self: 'one\ntwo'})('x')))
    monkeypatch.setitem(hostile.KINDS, 'broken', in_two_lines)
    assert 'AssertionError' in hostile.attempt('broken', None, sound)
