"""Make the tiny model of the tests from nothing but this folder: `python tests/tiny_model/train.py`.

Stories, tokenizer, training, planted outlier channels, checks, files: every step is seeded and runs on one
CPU thread, so a second run on the same machine and libraries should write the same bytes. It takes six to
eight minutes and is not run by the tests, which load the result from `tests/tiny_model/model`.
"""

import copy
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from outliers import plan_outliers, scale_channels
from stories import write_stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 256
HIDDEN, INTERMEDIATE, LAYERS = 128, 344, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
TRAIN_SEED, HELDOUT_SEED, MODEL_SEED = 1, 2, 3
TRAIN_STORIES, HELDOUT_STORIES = 26_000, 40
BATCH_ROWS = 4
PEAK_LR, WARMUP_STEPS = 2e-3, 100


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, so that sums are learnt digit by digit; it puts BOS first itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(stories, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_stories(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> list[list[int]]:
    """Token ids of every story, BOS first and no EOS; each must leave room for EOS in the context."""
    encoded: list[list[int]] = tokenizer(stories)["input_ids"]
    longest = max(map(len, encoded))
    assert longest < CONTEXT, f"a story has {longest} tokens, but the model reads {CONTEXT}"
    return encoded


def pack_rows(encoded: list[list[int]], eos: int) -> Tensor:
    """Rows of CONTEXT tokens (M, CONTEXT), each from the start of a story and cut where it is full.

    Starting at BOS matches the way held-out stories are scored, with nothing before them.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for story in encoded:
        row += [*story, eos]
        if len(row) >= CONTEXT:
            rows.append(row[:CONTEXT])
            row = []
    return torch.tensor(rows)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of under a million parameters; 344 is on purpose no multiple of the usual group sizes."""
    torch.manual_seed(MODEL_SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def share_kv_rows(weight: Tensor) -> Tensor:
    """The rows of every kv head (KV_HEADS * HEAD_DIM, K), repeated for each query head that shares it."""
    per_head = weight.view(KV_HEADS, HEAD_DIM, -1)
    return per_head.repeat_interleave(HEADS // KV_HEADS, dim=0).reshape(HEADS * HEAD_DIM, -1)


@torch.no_grad()
def start_lookup(model: LlamaForCausalLM) -> None:
    """Start the first two blocks as an induction circuit: "what followed this word the last time?".

    From a random start this much text did not teach the model that what was said can be looked up: it ended
    near a table of word pairs (held-out perplexity 2.45), which even 3 bits hardly harmed (2.46). So
    the first block's heads start out attending to the previous token, which they note in directions of their
    own; the second block's heads look for a note equal to the present token and copy the token it stands at
    (Olsson et al. 2022, "In-context Learning and Induction Heads"). Everything is trained afterwards; the
    constants only need to be roughly right.
    """
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, 0.1)
    embedding[:, 0] = 0.6  # alike in all tokens, so that a query can ask for a position and not for content
    notes, lookup = (model.model.layers[layer].self_attn for layer in (0, 1))
    directions = torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN))
    directions[:, 0] = 0.0
    token, note = directions.chunk(2)

    pairs = torch.arange(HEAD_DIM // 2)  # RoPE turns dimensions i and i + HEAD_DIM / 2 as a pair
    angles = 10_000.0 ** (-2 * pairs / HEAD_DIM)
    fast = (pairs < 6).float()
    for projection in (notes.q_proj, notes.k_proj):
        projection.weight.zero_()
    notes.q_proj.weight[:, 0] = 1.5 * torch.cat([fast, 0 * fast]).repeat(HEADS)
    notes.k_proj.weight[:, 0] = 1.5 * torch.cat([fast * angles.cos(), fast * angles.sin()]).repeat(KV_HEADS)
    notes.v_proj.weight.copy_(token)
    notes.o_proj.weight.copy_(0.1 * share_kv_rows(note).T)

    slow = (pairs >= 8).float().repeat(2 * KV_HEADS)[:, None]  # content must match at any distance
    lookup.q_proj.weight.copy_(2.5 * share_kv_rows(slow * token))
    lookup.k_proj.weight.copy_(2.5 * slow * note)
    lookup.v_proj.weight.copy_(token)
    lookup.o_proj.weight.copy_(0.4 * share_kv_rows(token).T)


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to a fiftieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))
    return PEAK_LR * (0.02 + 0.98 * cosine)


def train(model: LlamaForCausalLM, rows: Tensor) -> None:
    """One pass over the rows: no story is seen twice, so the model learns the grammar and not the text."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.03)
    batches = rows.split(BATCH_ROWS)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches))
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == len(batches) - 1:
            print(f"step {step:5d} of {len(batches)}: loss {loss.item():.4f}", flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, encoded: list[list[int]]) -> float:
    """exp of the mean negative log likelihood of every token after BOS, each story on its own."""
    total, count = 0.0, 0
    for story in encoded:
        ids = torch.tensor([story])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(story) - 1
    return math.exp(total / count)


def unigram_perplexity(train_stories: list[list[int]], encoded: list[list[int]], vocab: int) -> float:
    """Perplexity of the same tokens under the training text's token frequencies, with add-one smoothing."""
    counts = Counter(token for story in train_stories for token in story[1:])
    everything = sum(counts.values()) + vocab
    tokens = [token for story in encoded for token in story[1:]]
    return math.exp(-sum(math.log((counts[token] + 1) / everything) for token in tokens) / len(tokens))


@torch.no_grad()
def check_same_function(plain: LlamaForCausalLM, scaled: LlamaForCausalLM, encoded: list[list[int]]) -> float:
    """The largest logit difference relative to the largest logit; it must be float32 rounding."""
    worst = 0.0
    for story in encoded:
        before, after = (model(torch.tensor([story])).logits for model in (plain, scaled))
        worst = max(worst, ((before - after).abs().max() / before.abs().max()).item())
    assert worst <= 1e-5, f"the outliers changed the function: relative logit difference {worst:.2e}"
    return worst


def round_to_nearest(weight: Tensor, bits: int, group_size: int = 32) -> Tensor:
    """Asymmetric min-max fake quantization of (N, K) in groups along K; the last group may be short."""
    groups = []
    for group in weight.split(group_size, dim=1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        step = (high - low).clamp(min=1e-10) / (2**bits - 1)
        zero = (-low / step).round()
        codes = (group / step + zero).round().clamp(0, 2**bits - 1)
        groups.append((codes - zero) * step)
    return torch.cat(groups, dim=1)


@torch.no_grad()
def quantized_copy(model: LlamaForCausalLM, bits: int) -> LlamaForCausalLM:
    """The model with every linear of its blocks rounded to nearest; embeddings and norms stay."""
    quantized = copy.deepcopy(model)
    for name, parameter in quantized.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.copy_(round_to_nearest(parameter, bits))
    return quantized


def write_files(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: list[str]) -> None:
    folder = HERE / "model"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (HERE / "heldout.txt").write_text(f"\n{EOS}\n".join(heldout) + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    stories = write_stories(TRAIN_STORIES, TRAIN_SEED)
    heldout = write_stories(HELDOUT_STORIES, HELDOUT_SEED)
    assert not set(stories) & set(heldout), "a held-out story is also in the training text"
    tokenizer = train_tokenizer(stories)
    encoded, encoded_heldout = encode_stories(tokenizer, stories), encode_stories(tokenizer, heldout)

    trained = build_model(tokenizer)
    start_lookup(trained)
    train(trained, pack_rows(encoded, tokenizer.eos_token_id))

    # Rounding to float16 comes after the scaling, since division may push small weights into float16's
    # subnormals; taking the factors out of the rounded weights is then exact, and so is the comparison.
    plan = plan_outliers(trained)
    scaled = scale_channels(trained, plan, 1).half().float()
    plain = scale_channels(scaled, plan, -1)
    difference = check_same_function(plain, scaled, encoded_heldout)

    print(f"parameters {scaled.num_parameters()}, outlier channels {len(plan)}")
    print(f"largest relative logit difference, plain to outliers: {difference:.1e}")
    print(f"perplexity of chance {len(tokenizer)}, of unigrams ", end="")
    print(f"{unigram_perplexity(encoded, encoded_heldout, len(tokenizer)):.2f}")
    print(f"perplexity in float32 {perplexity(scaled, encoded_heldout):.4f}, in float16 ", end="")
    print(f"{perplexity(copy.deepcopy(scaled).half(), encoded_heldout):.4f}")
    for bits in (8, 4, 3):
        figures = [perplexity(quantized_copy(model, bits), encoded_heldout) for model in (plain, scaled)]
        print(f"RTN {bits} bits, group 32: plain {figures[0]:.4f}, with outliers {figures[1]:.4f}")
    write_files(scaled, tokenizer, heldout)


if __name__ == "__main__":
    main()
