"""Decoding as algorithms.md describes it: part A, and part B where A is silent.

Nothing is optimised. A block is a loop of steps; a step is one forward (the cache policy decides
which keys it sees), a choice (the rule decides which masks to commit), and a write.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import Forward, KeyValue, Model

POLICIES = ("none", "prefix", "dual", "sparse")
RULES = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin")
WINDOW = 16  # positions at the end of a prompt, where its question is
DEFAULT_RULE = {"llada": "low_confidence", "dream": "entropy"}


@dataclass(frozen=True)
class Options:
    """Every setting of a request (the keyword arguments of ``generate``)."""

    cache_policy: str = "sparse"
    keep_ratio: float = 0.5
    kernel_size: int | None = 3  # None: no pooling, the same as 1
    delay_steps: int = 1
    saliency: str = "paper"
    granularity: str = "token"
    page: int = 32
    eviction_delay: int = 0  # block steps between filling the cache and choosing what to keep
    refresh_interval: int = 1  # blocks that use the cache of one refresh
    suffix_window: int | None = None  # positions after the block that take part; None: all
    block_length: int = 32
    steps: int | None = None  # None: one per masked position
    remasking: str | None = None  # None: the model's own
    threshold: float | None = None
    factor: float | None = None
    alg_temp: float = 0.0
    cfg_scale: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    generator: torch.Generator | None = None
    ignore_eos: bool = True
    eos_id: int | None = None  # None: the model's own
    min_p: float = 0.0
    min_tokens: int = 0
    stop_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()  # as token ids
    allowed_token_ids: Sequence[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    canvas: Sequence[int] | None = None  # the first ids of the response; may contain masks
    allowed: Callable[[list[int]], Tensor] | None = None  # a grammar: response so far -> [vocab]
    # Receives, for each ranking, the relative lead of the last committed over the next candidate.
    leads: list[float] | None = None

    def __post_init__(self) -> None:
        if self.cache_policy not in POLICIES:
            raise ValueError(f"cache_policy {self.cache_policy!r}")
        if self.remasking is not None and self.remasking not in RULES:
            raise ValueError(f"remasking {self.remasking!r}")
        if self.saliency not in ("paper", "attention", "window"):
            raise ValueError(f"saliency {self.saliency!r}")
        if self.granularity not in ("token", "page"):
            raise ValueError(f"granularity {self.granularity!r}")
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd (A9)")
        if self.factor is not None and self.threshold is not None:
            raise ValueError("factor with threshold set (A6)")

    @property
    def adaptive(self) -> bool:
        """Whether threshold or factor sets how many commit; rules then rank by probability."""
        return self.threshold is not None or self.factor is not None


@dataclass
class Stats:
    """The cost and the commits of a run. Forwards of CFG's second sequence count separately."""

    full_forwards: int = 0
    block_forwards: int = 0  # steps with a cache: block steps, or the suffix steps of `prefix`
    query_tokens: int = 0
    commits: list[list[list[int]]] = field(default_factory=list)  # [block][step] -> positions
    confidences: dict[int, float] = field(default_factory=dict)  # position -> at its commit
    # [change of the cache][layer] -> positions
    kept: list[list[Tensor]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)  # kinds of change: refresh, evict, append

    @property
    def reveals(self) -> list[list[int]]:
        """[block][step] -> number of positions committed."""
        return [[len(positions) for positions in block] for block in self.commits]


def generate(model: Model, prompt_ids: Sequence[int], max_tokens: int, **options: Any) -> list[int]:
    """The response ids; keyword arguments are the fields of ``Options``."""
    return generate_with_stats(model, prompt_ids, max_tokens, **options)[0]


@torch.inference_mode()
def generate_with_stats(
    model: Model, prompt_ids: Sequence[int], max_tokens: int, **options: Any
) -> tuple[list[int], Stats]:
    o, stats = Options(**options), Stats()
    prompt, total = len(prompt_ids), len(prompt_ids) + max_tokens
    x = torch.full((total,), model.mask_id)
    x[:prompt] = torch.tensor(prompt_ids, dtype=torch.long)
    if o.canvas is not None:
        x[prompt : prompt + len(o.canvas)] = torch.tensor(o.canvas)
    streams = [Stream(model, x, o, stats, prompt)]
    if o.cfg_scale > 0:  # A10: the same canvas with an all-mask prompt
        if model.kind != "llada":
            raise ValueError("cfg_scale is for LLaDA (A10)")
        unconditional = x.clone()
        unconditional[:prompt] = model.mask_id
        streams.append(Stream(model, unconditional, o, stats, prompt))

    s = prompt
    to_write = (x[prompt:] == model.mask_id).tolist()
    sized = blocks_with_masks(to_write, o.block_length, o.steps)
    for number, (size, masks, steps) in enumerate(sized):
        e = s + size
        stats.commits.append([])
        i = 0
        while (x[s:e] == model.mask_id).any():  # A2: the block ends when it holds no mask
            logits = [stream.logits(number, i, s, e).float() for stream in streams]  # A4
            guided = logits[0]
            if o.cfg_scale > 0:  # A10
                guided = logits[1] + (o.cfg_scale + 1) * (logits[0] - logits[1])
            rows = (x[s:e] == model.mask_id).nonzero()[:, 0]  # A5: the candidates
            special = model.kind == "dream" and o.cache_policy != "none" and i == 0
            special = special and bool(x[s] == model.mask_id)
            if special or o.allowed:  # A8, B7, B8: only x[s] is written; a grammar: the first mask
                rows = rows[:1]
            places = s - prompt + rows
            edited = guided[rows]
            if o.allowed is not None:
                edited = edited.masked_fill(
                    ~o.allowed(x[prompt : s + rows[0]].tolist()), -torch.inf
                )
            edited = constrain(edited, places, x, prompt, o, model)
            if special or o.allowed:
                tokens, probs = draw(edited, model, o)
                chosen = torch.tensor([0])
            else:
                state = None if o.generator is None else o.generator.get_state()
                tokens, chosen = choose(edited, model, o, i, steps, masks)
                if len(chosen):  # repeat its draws, for the distribution that it ranked by
                    probs = distribution(edited, model, o, state)
                chosen = without_bad_words(tokens, chosen, places, x[prompt:], o)
            positions = s + rows[chosen]
            if len(chosen):
                values = confidence(probs, tokens, o.remasking or DEFAULT_RULE[model.kind], o)
                stats.confidences.update(
                    zip(positions.tolist(), values[chosen].tolist(), strict=True)
                )
            for stream in streams:
                stream.x[positions] = tokens[chosen]
            stats.commits[-1].append(positions.tolist())
            i += 1
        if i == 0:  # nothing to write: the next block fills its own cache
            for stream in streams:
                stream.filled = -1
        s = e

    response = x[prompt:].tolist()
    eos = model.eos_id if o.eos_id is None else o.eos_id
    stops = [*([] if o.ignore_eos else [eos]), *o.stop_ids]
    ends = [response.index(token) + 1 for token in stops if token in response]  # A11
    response = response[: min(ends, default=len(response))]
    return response, stats


def blocks_with_masks(
    masked: Sequence[bool], length: int, steps: int | None
) -> Iterator[tuple[int, int, int]]:
    """A1 for a partly given response: (size, masks, steps) of each block, steps shared by masks."""
    parts = [masked[start : start + length] for start in range(0, len(masked), length)]
    total = sum(masked)
    t = total if steps is None else steps
    shares = [max(1, t * sum(part) // total) if any(part) else 0 for part in parts]
    left = t - sum(shares)
    for part, share in zip(parts, shares, strict=True):
        more = 1 if any(part) and left > 0 else 0
        left -= more
        yield len(part), sum(part), share + more


def blocks(total: int, length: int, steps: int) -> Iterator[tuple[int, int]]:
    """A1: (size, steps) of each block; steps left over go one each to the first blocks."""
    sizes = [min(length, total - start) for start in range(0, total, length)]
    shares = [max(1, steps * size // total) for size in sizes]
    left = steps - sum(shares)
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        yield size, share + (1 if number < left else 0)


# ---------------------------------------------------------------- which keys a step sees (A8, A9)


@dataclass
class Kept:
    """The entries that one layer keeps: positions ``[n]`` in storage order, keys and values."""

    positions: Tensor
    k: Tensor  # [kv heads, n, hd]
    v: Tensor

    def take(self, which: Tensor) -> "Kept":
        return Kept(self.positions[which], self.k[:, which], self.v[:, which])

    def join(self, other: "Kept") -> "Kept":
        return Kept(
            torch.cat([self.positions, other.positions]),
            torch.cat([self.k, other.k], dim=1),
            torch.cat([self.v, other.v], dim=1),
        )


class Stream:
    """A canvas of L ids, and the entries that each layer keeps for the coming steps."""

    def __init__(self, model: Model, x: Tensor, o: Options, stats: Stats, prompt: int) -> None:
        self.model, self.x, self.o, self.stats, self.prompt = model, x, o, stats, prompt
        self.cache: list[Kept] = []
        self.filled = -1  # the block in which the cache was filled last

    def logits(self, number: int, i: int, s: int, e: int) -> Tensor:
        """Run step i of block ``number``, [s, e), in one forward: the rows that predict s..e-1."""
        policy = self.o.cache_policy
        fill = self.o.delay_steps if policy == "sparse" else 0
        # Positions beyond the window do not take part.
        far = len(self.x)
        if self.o.suffix_window is not None:
            far = min(far, e + self.o.suffix_window)
        # The block continues with the cache of an earlier block.
        goes_on = self.filled >= 0 and self.filled < number < self.filled + self.o.refresh_interval
        if policy == "none" or (i <= fill and not goes_on):
            out = self._run(0, far, None)
            if policy != "none" and i == fill:
                self.cache = self._frozen(out, s, e, far)  # from before this step's commits
                self.filled = number
            return self._rows(out, 0, s, e)
        start, end = s, far if policy == "prefix" else e
        if goes_on and i == 0:
            start = s - self.o.block_length  # only the last block may be shorter
            self.cache = [
                layer.take(((layer.positions < s) | (layer.positions >= end)).nonzero()[:, 0])
                for layer in self.cache
            ]
        out = self._run(start, end, [(layer.k, layer.v) for layer in self.cache])
        if goes_on and i == 0:
            done = torch.arange(s - start)
            self.cache = [
                layer.join(Kept(done + start, k[:, done], v[:, done]))
                for layer, k, v in zip(self.cache, out.k, out.v, strict=True)
            ]
            self._record("append", [layer.positions for layer in self.cache])
        late = self.o.eviction_delay
        if policy == "sparse" and late and not goes_on and i == fill + late:
            self._evict(out)
        return self._rows(out, start, s, e)

    def _run(self, start: int, end: int, cache: list[KeyValue] | None) -> Forward:
        self.stats.full_forwards += cache is None
        self.stats.block_forwards += cache is not None
        self.stats.query_tokens += end - start
        return self.model(self.x[start:end], range(start, end), cache)

    def _rows(self, out: Forward, start: int, s: int, e: int) -> Tensor:
        """The rows that predict [s, e), given those from ``start`` on; Dream shifts them (B6)."""
        logits = out.logits
        if self.model.kind == "dream":
            logits = torch.cat([logits[:1], logits[:-1]])
        return logits[s - start : e - start]

    def _frozen(self, out: Forward, s: int, e: int, far: int) -> list[Kept]:
        """The entries of this full forward that later steps see besides their own keys (B4, B5)."""
        others = torch.cat([torch.arange(s), torch.arange(e, far)])
        kept = []
        for q, k in zip(out.q, out.k, strict=True):
            if self.o.cache_policy == "prefix":
                kept.append(others[:s])
            elif self.o.cache_policy == "dual" or self.o.eviction_delay > 0:
                kept.append(others)
            else:
                last = q[:, max(0, self.prompt - WINDOW) : self.prompt]
                scores = worth(self.o.saliency, [q[:, s:e], last], k, others, self.prompt)
                kept.append(others[select(scores, self.o)])
        self._record("refresh", kept)
        return [Kept(j, k[:, j], v[:, j]) for j, k, v in zip(kept, out.k, out.v, strict=True)]

    def _evict(self, out: Forward) -> None:
        """Keep only those cached entries that are the most salient for this step's queries."""
        cache = []
        for q, own, layer in zip(out.q, out.k, self.cache, strict=True):
            seen = torch.cat([layer.k, own], dim=1)
            others = torch.arange(layer.k.shape[1])
            scores = worth(self.o.saliency, [q], seen, others, self.prompt)
            cache.append(layer.take(select(scores, self.o)))
        self.cache = cache
        self._record("evict", [layer.positions for layer in self.cache])

    def _record(self, kind: str, kept: list[Tensor]) -> None:
        self.stats.changes.append(kind)
        self.stats.kept.append(kept)


def worth(saliency: str, groups: list[Tensor], k: Tensor, others: Tensor, prompt: int) -> Tensor:
    """Scores of the others among all keys; the first group of queries is the block's.  -> [n]."""
    if saliency == "attention":
        return attention_importance(groups[0], k, others)
    if saliency == "window":
        return window_importance(groups, k, others, prompt)
    return importance(groups[0], k[:, others])


def importance(q: Tensor, k: Tensor) -> Tensor:
    """B5 2-4: raw dot products of the block's mean query, averaged over query heads.  -> [n]."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    return torch.einsum("hd,hnd->hn", q.mean(dim=1), k).mean(dim=0)


def attention_importance(q: Tensor, k: Tensor, others: Tensor) -> Tensor:
    """The share of attention that each of the others gets, mean over rows and heads.  -> [n]."""
    paid = [share[:, others] for share in shares(q, k)]
    return torch.cat(paid).mean(dim=0)


def shares(q: Tensor, k: Tensor) -> list[Tensor]:
    """How each head's rows spread their attention over all keys.  -> heads of [rows, m]."""
    own = [k[head * len(k) // len(q)] for head in range(len(q))]
    scale = q.shape[-1] ** 0.5
    return [torch.softmax(q[head] @ keys.T / scale, dim=-1) for head, keys in enumerate(own)]


def window_importance(groups: list[Tensor], k: Tensor, others: Tensor, prompt: int) -> Tensor:
    """Scores by the attention that groups of rows ([heads, rows, hd]) pay to ``k``.  -> [n].

    A key's score is the sum of the groups' mean shares, in the head where this sum is largest.
    The last WINDOW positions of the prompt score above all others, later ones higher.
    """
    votes = torch.zeros(len(groups[0]), k.shape[1])
    for q in groups:
        votes += torch.stack([share.mean(dim=0) for share in shares(q, k)])
    worth = votes.max(dim=0).values[others]
    for place in range(max(0, prompt - WINDOW), prompt):
        worth[place] = 10.0 + place
    return worth


def select(scores: Tensor, o: Options) -> Tensor:
    """B5 5-7 and A9: indices of the kept entries among the n others, in top-k order."""
    n = len(scores)
    keep = int(n * o.keep_ratio)
    pooled = scores.unsqueeze(0)
    if o.kernel_size is not None and n:
        pooled = F.max_pool1d(pooled, o.kernel_size, stride=1, padding=o.kernel_size // 2)
    if o.granularity == "token":
        return torch.topk(pooled, keep).indices[0]
    runs = list(torch.split(torch.arange(n), o.page)) if n else []
    best = torch.tensor([[pooled[0, run].max() for run in runs]], dtype=scores.dtype)
    order = torch.topk(best, -(-keep // o.page)).indices[0]
    return torch.cat([runs[r] for r in order.tolist()] or [torch.arange(0)])


# ------------------------------------------------------------------ what a request rules out


def constrain(
    logits: Tensor, places: Tensor, x: Tensor, prompt: int, o: Options, model: Model
) -> Tensor:
    """The logits [m, vocab] of the response's masked places [m] with the request's edits."""
    logits = logits.clone()
    response = x[prompt:].tolist()
    eos = model.eos_id if o.eos_id is None else o.eos_id
    if o.allowed_token_ids is not None:
        allowed = torch.isin(torch.arange(model.vocab), torch.tensor(o.allowed_token_ids))
        logits[:, ~allowed] = -torch.inf
    for row, place in zip(logits, places.tolist(), strict=True):
        for word in o.bad_words:
            for k, token in enumerate(word):
                # With the k-th token here, the word would begin at place - k.
                if completes(response, word, place - k, place, token):
                    row[token] = -torch.inf
        if place < o.min_tokens:
            row[[*o.stop_ids, eos]] = -torch.inf
    for token, bias in o.logit_bias.items():
        logits[:, token] += bias
    written = torch.tensor([t for t in response if t != model.mask_id], dtype=torch.long)
    counts = torch.bincount(written, minlength=model.vocab)
    if o.repetition_penalty != 1:
        seen = (counts + torch.bincount(x[:prompt], minlength=model.vocab)) > 0
        p = o.repetition_penalty
        logits = torch.where(seen & (logits > 0), logits / p, torch.where(seen, logits * p, logits))
    weights = o.frequency_penalty * counts.double() + o.presence_penalty * (counts > 0)
    return logits - weights.float()


def completes(
    response: Sequence[int], word: Sequence[int], start: int, place: int, token: int
) -> bool:
    """Whether ``token`` at ``place`` makes the response hold ``word`` from ``start`` on."""
    if start < 0 or start + len(word) > len(response):
        return False
    return all(
        (token if p == place else response[p]) == word[p - start]
        for p in range(start, start + len(word))
    )


def without_bad_words(
    tokens: Tensor, chosen: Tensor, places: Tensor, response: Tensor, o: Options
) -> Tensor:
    """The chosen rows, surest first, except those that complete a bad word in the response."""
    stands, kept = response.tolist(), []
    for row in chosen.tolist():
        place, token = int(places[row]), int(tokens[row])
        if not any(
            completes(stands, word, place - k, place, token)
            for word in o.bad_words
            for k in range(len(word))
        ):
            stands[place] = token
            kept.append(row)
    return torch.tensor(kept, dtype=torch.long)


# ------------------------------------------------- which tokens a step commits (A3-A7, B2, B4, B6)


def choose(
    logits: Tensor, model: Model, o: Options, i: int, steps: int, size: int
) -> tuple[Tensor, Tensor]:
    """Step i over the block's masked rows: a token for each row, and which rows to commit."""
    m = len(logits)
    rule = o.remasking or DEFAULT_RULE[model.kind]
    if o.adaptive:
        tokens, probs = draw(logits, model, o)
        conf, order = confidence(probs, tokens, rule, o).sort(descending=True, stable=True)
        if o.threshold is not None:
            return tokens, order[: at_threshold(conf, o.threshold)]
        assert o.factor is not None
        return tokens, order[: at_factor(conf, o.factor)]
    if rule == "origin":  # B6: each mask by itself; all at the last step
        tokens, _ = draw(logits, model, o)
        r, order = torch.rand(m, generator=o.generator).sort(stable=True)
        return tokens, order[r < origin_probability(i, steps)]
    k = llada_quota(i, steps, size) if model.kind == "llada" else dream_count(i, steps, m)
    if k == 0:
        return torch.empty(m, dtype=torch.long), torch.empty(0, dtype=torch.long)
    tokens, probs = draw(logits, model, o)
    if rule == "random":
        conf = torch.rand(m, generator=o.generator)
    else:
        conf = confidence(probs, tokens, rule, o)
    if o.alg_temp > 0:  # k positions without replacement, as an exponential race
        e = torch.empty(m, dtype=torch.float64).exponential_(generator=o.generator)
        conf = torch.softmax(conf.double() / o.alg_temp, dim=-1) / e
    values, order = conf.sort(descending=True, stable=True)
    if o.leads is not None and k < m:
        o.leads.append(float((values[k - 1] - values[k]) / values[k - 1].abs()))
    return tokens, order[:k]


def confidence(probs: Tensor, tokens: Tensor, rule: str, o: Options) -> Tensor:
    """A6: what a rule ranks by; the probability for a rule that orders at random."""
    if rule == "topk_margin" and not o.adaptive:
        first, second = probs.topk(2).values.unbind(-1)
        return first - second
    if rule == "entropy" and not o.adaptive:
        return (probs * torch.log(probs + 1e-10)).sum(-1)
    return probability(probs, tokens)


def distribution(logits: Tensor, model: Model, o: Options, state: Tensor | None) -> Tensor:
    """The distribution of `draw` from generator state ``state``; the generator keeps its own."""
    if o.generator is None or state is None:
        return draw(logits, model, o)[1]
    now = o.generator.get_state()
    o.generator.set_state(state)
    probs = draw(logits, model, o)[1]
    o.generator.set_state(now)
    return probs


def draw(logits: Tensor, model: Model, o: Options) -> tuple[Tensor, Tensor]:
    """A3, A7: a token for each row (never the mask id), and the distribution for its confidence."""
    tokens_allowed = torch.arange(model.vocab) != model.mask_id
    greedy = logits.masked_fill(~tokens_allowed, -torch.inf).argmax(-1)
    if o.temperature == 0:
        return greedy, torch.softmax(logits, -1)
    tempered = logits / o.temperature
    probs = torch.softmax(tempered, -1)
    tempered = tempered.masked_fill(probs < o.min_p * probs.max(-1, True).values, -torch.inf)
    filtered = top_p_top_k(tempered, o.top_p, o.top_k)
    noise = torch.empty(logits.shape, dtype=torch.float64)
    if model.kind == "llada":  # Gumbel-max; log of exp(logits) / (-log u) ** temperature
        u = noise.uniform_(generator=o.generator)
        probs = torch.softmax(logits, -1)
        score = logits.double() - o.temperature * torch.log(-torch.log(u))
    else:  # categorical, as an exponential race
        probs = torch.softmax(filtered, -1)
        score = probs.double() / noise.exponential_(generator=o.generator)
    alive = tokens_allowed & (filtered > -torch.inf)
    drawn = score.masked_fill(~alive, -torch.inf).argmax(-1)
    return torch.where(alive.any(-1), drawn, greedy), probs  # the filter may leave only the mask id


def top_p_top_k(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Dream's order: top_p, then top_k; what is cut becomes -inf."""
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        before = torch.softmax(ranked, -1).cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0  # probability of everything ranked higher
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def probability(probs: Tensor, tokens: Tensor) -> Tensor:
    return probs.gather(-1, tokens[:, None])[:, 0]


def at_threshold(conf: Tensor, threshold: float) -> int:
    """B4: of descending confidences, count the first and all others with c >= t in float32."""
    return max(1, int((conf >= torch.tensor(threshold, dtype=torch.float32)).sum()))


def at_factor(conf: Tensor, factor: float) -> int:
    """B4, the 2601 form, quirk included."""
    m = len(conf)
    h = torch.tensor([-1.0] + [1 - factor / (i + 2) for i in range(1, m)], dtype=torch.float32)
    k = next((i for i in range(m) if conf[i] < h[i]), m - 1)
    return k + 1 if k in (0, m - 1) else k


def llada_quota(i: int, steps: int, masks: int) -> int:
    """B2.4; past the last step one at a time (A2)."""
    if i >= steps:
        return 1
    return masks // steps + (1 if i < masks % steps else 0)


def dream_count(i: int, steps: int, masks: int) -> int:
    """B6 in float32, truncated; everything at the last step, past it one at a time (A2)."""
    if i >= steps:
        return 1
    if i == steps - 1:
        return masks
    return int(masks * leaving(i, steps))


def origin_probability(i: int, steps: int) -> Tensor:
    return torch.tensor(1.0) if i >= steps - 1 else leaving(i, steps)


def leaving(i: int, steps: int) -> Tensor:
    """B6: 1 - t[i+1] / t[i], float32."""
    t = torch.linspace(1, 1e-3, steps + 1)
    return 1 - t[i + 1] / t[i]
