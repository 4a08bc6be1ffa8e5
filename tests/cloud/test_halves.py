"""Half of a model's blocks on two `apt-model serve` processes, one of which is killed and comes back on the way."""

import copy
import logging
import threading
from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from clouds import counts
from served import running
from small_models import build, tokens
from torch import nn

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.breaker import Breaker
from apt_model.cloud.client import Client
from apt_model.cloud.http_transport import HttpTransport
from apt_model.optimization.remote_layers import offload_layers

TRUST = {"left_spin_mode": "trust", "num_encoder_layers": 4, "num_decoder_layers": 4}
LLAMA = tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
                       num_key_value_heads=1, max_position_embeddings=64, vocab_size=37, use_cache=False,
                       bos_token_id=1, eos_token_id=2)  # fmt: skip
GPT2 = tf.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=37, use_cache=False, attn_pdrop=0.0,
                     resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


class Server:
    """`apt-model serve` at one port, that can be killed and started again, with nothing of what it held."""

    def __init__(self):
        self._port = 0
        self.start()

    def start(self):
        self._held = ExitStack()
        self.process, self._port = self._held.enter_context(running("--allow-upload", port=self._port))
        self.url = f"http://127.0.0.1:{self._port}"

    def kill(self):
        self.process.kill()  # SIGKILL

    def close(self):
        self._held.close()


@pytest.fixture(scope="module")
def servers():
    made = [Server(), Server()]
    yield made
    for each in made:
        each.close()


def backend_of(*servers):
    """A backend over these, as replicas, whose breakers soon try again."""
    transports = [HttpTransport(each.url) for each in servers]
    breaker = lambda: Breaker(threshold=1, first=0.05, longest=0.05)  # noqa: E731
    # Nothing is late: where a block is computed follows from which servers are there.
    return OIPBackend(transports, client=Client(transports, breaker=breaker, late=None))


class Half:
    """A model, half of whose blocks are elsewhere, and the same model here."""

    def __init__(self, model, inputs, *places):
        self.here = model.requires_grad_(False).eval()
        self.there = copy.deepcopy(self.here)
        self.inputs = inputs
        self.forwards = 0
        self.blocks = [offload_layers(self.there, layers, cloud_backend=backend, stack=stack, **options)
                       for layers, stack, backend, options in places]  # fmt: skip

    def forward(self):
        """Whether all of it was computed elsewhere; the logits must be the local ones, bit for bit."""
        self.forwards += 1
        before = [counts(each)[0] for each in self.blocks]
        with torch.no_grad():
            found, expected = (logits(model(*self.inputs)) for model in (self.there, self.here))
        assert torch.equal(found, expected)
        for each in self.blocks:
            cloud, local, raised = counts(each)
            assert (cloud + local, raised) == (self.forwards, 0)
        return [counts(each)[0] - old for each, old in zip(self.blocks, before, strict=True)]


def logits(output):
    return getattr(output, "logits", output)


def halves(first, second, both):
    """Of four models, the later half of each stack: a block a server, or both on both servers as replicas."""
    source, target = tokens(2, 9, seed=1), tokens(2, 5, seed=2)
    only = {"fallback_local": False}
    return [
        Half(build(decoder_only=True, **TRUST), [source],
             ((2, 2), "decoder", first, {}), ((3, 3), "decoder", second, {})),
        Half(build(**TRUST, pad_token_id=3), [source, target],
             ((2, 3), "encoder", first, {}), ((2, 3), "decoder", second, {})),
        Half(build(), [source, target], ((0, 1), "encoder", first, {})),  # design mode: a stack goes as one
        Half(tf.LlamaForCausalLM(LLAMA), [source],
             ((2, 2), "decoder", first, {}), ((3, 3), "decoder", second, {})),
        Half(tf.GPT2LMHeadModel(GPT2), [source], ((2, 3), "decoder", both, only)),
    ]  # fmt: skip


def test_a_server_is_killed_and_comes_back_in_a_sequence_of_forwards(servers):
    first, second, both = (backend_of(*each) for each in ([servers[0]], [servers[1]], servers))
    models = halves(first, second, both)
    for _ in range(3):
        assert [each.forward() for each in models] == [[1, 1], [1, 1], [1], [1, 1], [1]]

    killer = threading.Thread(target=servers[0].kill)  # somewhere within the next forwards
    killer.start()
    for each in models:
        each.forward()
    killer.join()
    servers[0].process.wait()
    for _ in range(3):
        # The other server computes on; a replica has taken over, and nothing fell back there.
        assert [each.forward() for each in models] == [[0, 1], [0, 1], [0], [0, 1], [1]]

    servers[0].close()
    servers[0].start()  # knows none of the weights
    threading.Event().wait(0.1)  # the breaker's time
    pushed = [each.get_stats()["bytes_pushed"] for half in models for each in half.blocks]
    for _ in range(3):
        assert [each.forward() for each in models] == [[1, 1], [1, 1], [1], [1, 1], [1]]
    again = [each.get_stats()["bytes_pushed"] for half in models for each in half.blocks]
    # Given anew: the blocks of the first server and of the replicas, and no other.
    assert [new > old for old, new in zip(pushed, again, strict=True)] == [1, 0, 1, 0, 1, 1, 0, 1]
    for each in (first, second, both):
        each.close()
        assert all(endpoint.transport.open_connections == 0 for endpoint in each.client.endpoints)


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank term that trains."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted(model, *names):
    """The model, frozen but for adapters at these places."""
    model.requires_grad_(False)
    torch.manual_seed(3)
    for name in names:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("name", ["apt", "llama"])
def test_adapters_around_blocks_elsewhere_get_the_gradients_of_the_model_here(servers, name):
    backends = [backend_of(each) for each in servers]
    if name == "apt":
        model = adapted(build(decoder_only=True, **TRUST), "decoder_layers.0.feed_forward.body.up_proj", "lm_head")
    else:
        model = adapted(tf.LlamaForCausalLM(LLAMA), "model.layers.0.mlp.up_proj", "lm_head")
    here, ids = copy.deepcopy(model), tokens(3, 8, seed=5)
    blocks = [offload_layers(model, (2 + n, 2 + n), cloud_backend=each, fallback_local=False)
              for n, each in enumerate(backends)]  # fmt: skip
    for step in range(3):
        losses = [nn.functional.cross_entropy(logits(each(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                  for each in (model, here)]  # fmt: skip
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        grads = [{name: each.grad for name, each in which.named_parameters() if each.requires_grad}
                 for which in (model, here)]  # fmt: skip
        assert len(grads[0]) == 8
        for key, grad in grads[0].items():
            assert grad.any()
            assert torch.equal(grad, grads[1][key]), key
        for each in (model, here):
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1).step()
            each.zero_grad()
        for each in blocks:
            assert counts(each) == (step + 1, 0, 0)
            assert (each.get_stats()["backward_cloud"], each.get_stats()["backward_local"]) == (step + 1, 0)
    for each in backends:
        each.close()
