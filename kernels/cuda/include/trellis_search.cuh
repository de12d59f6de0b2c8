// The Viterbi search of quantc/numerics/trellis/encode.py by a block of threads: the same states, bit for bit.
//
// A step goes from the costs of states to those after one more symbol. The 2^BITS states that share their low bits, the
// head, lead to the same 2^BITS states, which are neighbours. A thread has 16 neighbouring states: it looks for the least
// cost of their heads (of which it has several, or for 5 bits shares one with the next thread), notes in a byte which
// these were, and adds what each symbol costs. The least of all costs, which a step takes off, comes with the costs
// before it: one barrier a step.
//
// Needs what trellis.cuh needs.
#pragma once

#include "trellis.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, OWN = STATES / THREADS;
constexpr int SYMBOLS = 1 << BITS, HEADS = STATES >> BITS;
constexpr int OWN_HEADS = OWN > SYMBOLS ? OWN / SYMBOLS : 1;
constexpr int SHARERS = SYMBOLS > OWN ? SYMBOLS / OWN : 1;  // threads that have states of one head
constexpr int OWN_SYMBOLS = SYMBOLS / SHARERS;              // of those that fall out, which a thread compares
constexpr int CHOICE_BITS = 8 / OWN_HEADS;
constexpr int AROUND = 32;  // numbers on either side of the seam that the free run sees
constexpr int OPENING = (STATE_BITS - 1) / BITS;  // steps after which no state hands on a bit of the head
constexpr int LARGEST = 32767, LARGEST_TILE = 96, VALUE_UNIT = 3800;
constexpr float FARTHEST = 5.2f;

// In shared memory; all threads of a block may read all of it.
struct SearchMemory {
    u16 costs[2][STATES];  // int16
    int least[2][WARPS];   // of the costs of a warp's states
    int found[WARPS];
    int inputs[LARGEST_TILE];  // of every step: see input_of
};
// Then a byte of each thread for every step: THREADS * tile.

// A number in units of 1 / VALUE_UNIT.
INLINE int input_of(float number) {
    const float x = number > -FARTHEST ? number < FARTHEST ? number : FARTHEST : -FARTHEST;
    return (int)rintf(x * VALUE_UNIT);
}

INLINE int least_of(const int (&values)[WARPS]) {
    int least = ld_shared(values);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) least = min(least, ld_shared(values + w));
    return least;
}

// Costs with their numbers: the upper and the lower half of a word, before what tells them apart.
INLINE int upper_key(u32 word, int number) { return (int)((word & 0xffff0000u) | (u32)number); }
INLINE int lower_key(u32 word, int number) { return (int)(word << 16 | (u32)number); }

struct Search {
    SearchMemory* memory;
    u8* choices;
    int length;
    int turn;                     // the costs that are read
    int values[OWN];              // of this thread's states, as path_values says

    INLINE Search(u8* shared, int length, const int* all_values)
        : memory((SearchMemory*)shared), choices(shared + sizeof(SearchMemory)), length(length), turn(0) {
#pragma unroll
        for (int o = 0; o < OWN; ++o) values[o] = all_values[threadIdx.x * OWN + o];
    }

    // The state at step threadIdx.x (where there is one) of the closed walk nearest to the numbers of memory->inputs, which
    // is written but for a barrier. Every thread calls it; a barrier has to follow before `inputs` is written again.
    INLINE int find() {
        start([](int) { return 0; });
        sync_block();
        for (int i = 0; i < 2 * AROUND; ++i) step((i + length - AROUND) % length, max(i - AROUND, 0));
        const int head = before(cheapest(), AROUND) & (HEADS - 1);
        start([=](int state) { return (state & (HEADS - 1)) == head ? 0 : LARGEST; });
        sync_block();
        for (int i = 0; i < length; ++i) step(i, i);
        int least = LARGEST << 16;
        for (int symbol = 0; symbol < SYMBOLS; ++symbol)
            least = min(least, lower_key(ld_shared(memory->costs[turn] + symbol * HEADS + head), symbol));
        return walk(head, (least & (SYMBOLS - 1)) * HEADS + head);
    }

    // Sets this thread's costs, where nobody still reads the ones before.
    template <class COST>
    INLINE void start(COST cost) {
        turn ^= 1;
        int costs[OWN];
#pragma unroll
        for (int o = 0; o < OWN; ++o) costs[o] = cost((int)threadIdx.x * OWN + o);
        store(costs);
        if (threadIdx.x < WARPS) st_shared(memory->least[turn] + threadIdx.x, 0);
    }

    INLINE void store(const int (&costs)[OWN]) {
        uint4* to = (uint4*)(memory->costs[turn] + threadIdx.x * OWN);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) words[w] = lower_halves(costs[half * 8 + 2 * w], costs[half * 8 + 2 * w + 1]);
            st_shared(to + half, make_uint4(words[0], words[1], words[2], words[3]));
        }
    }

    // The least costs of the thread's heads, each with the symbol that falls out, the first of equal ones.
    INLINE void compare(int (&heads)[OWN_HEADS]) const {
        const int first_symbol = threadIdx.x % SHARERS * OWN_SYMBOLS;
        const u16* from = memory->costs[turn] + first_symbol * HEADS + threadIdx.x / SHARERS * OWN_HEADS;
#pragma unroll
        for (int h = 0; h < OWN_HEADS; ++h) heads[h] = LARGEST << 16 | 0xffff;
#pragma unroll
        for (int p = 0; p < OWN_SYMBOLS; ++p) {
            u32 words[4];
            read_heads(words, from + p * HEADS);
#pragma unroll
            for (int h = 0; h < OWN_HEADS; ++h) {
                const u32 word = words[h / 2];
                heads[h] = min(heads[h], h % 2 ? upper_key(word, first_symbol + p) : lower_key(word, first_symbol + p));
            }
        }
        if (SHARERS > 1) heads[0] = min(heads[0], shuffle_xor(heads[0], 1));
    }

    INLINE static void read_heads(u32 (&words)[4], const u16* from) {
        if (OWN_HEADS == 1) words[0] = ld_shared(from);
        if (OWN_HEADS == 2) words[0] = ld_shared((const u32*)from);
        if (OWN_HEADS == 4) {
            const uint2 v = ld_shared((const uint2*)from);
            words[0] = v.x, words[1] = v.y;
        }
        if (OWN_HEADS == 8) {
            const uint4 v = ld_shared((const uint4*)from);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        }
    }

    // place: of the number. row: where the choices go.
    INLINE void step(int place, int row) {
        int heads[OWN_HEADS];
        compare(heads);
        u32 chosen = 0;
#pragma unroll
        for (int h = 0; h < OWN_HEADS; ++h) chosen |= (heads[h] & (SYMBOLS - 1)) << h * CHOICE_BITS;
        st_shared(choices + row * THREADS + threadIdx.x, (u8)chosen);
        const int number = ld_shared(memory->inputs + place), taken = least_of(memory->least[turn]);
        int costs[OWN], least = LARGEST;
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int difference = number - values[o];
            const int distance = (difference * difference + (1 << 14)) >> 15;
            costs[o] = min(distance + (heads[o >> BITS] >> 16) - taken, LARGEST);
            least = min(least, costs[o]);
        }
        turn ^= 1;
        store(costs);
        least = least_of_warp(least);
        if (threadIdx.x % 32 == 0) st_shared(memory->least[turn] + threadIdx.x / 32, least);
        sync_block();
    }

    // The first of the cheapest states.
    INLINE int cheapest() const {
        int least = 0x7fffffff;
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int state = threadIdx.x * OWN + o;
            least = min(least, (short)ld_shared(memory->costs[turn] + state) * STATES + state);
        }
        least = least_of_warp(least);
        if (threadIdx.x % 32 == 0) st_shared(memory->found + threadIdx.x / 32, least);
        sync_block();
        return least_of(memory->found) & (STATES - 1);
    }

    // From the state after step i: the one before it.
    INLINE int before_step(int state, int i) const {
        const int head = state >> BITS;
        const u32 byte = ld_shared(choices + i * THREADS + head * SHARERS / OWN_HEADS);
        return head + (byte >> head % OWN_HEADS * CHOICE_BITS & (SYMBOLS - 1)) * HEADS;
    }

    // From the state after `steps` steps: the one before all.
    INLINE int before(int state, int steps) const {
        for (int i = steps - 1; i >= 0; --i) state = before_step(state, i);
        return state;
    }

    // The state after step threadIdx.x of the walk to `state`. The first states are made to come after the head: they do
    // already, unless a path out of another head looked as cheap. Among numbers far from all codes many costs are LARGEST.
    INLINE int walk(int head, int state) const {
        constexpr int OWN_BITS = BITS * OPENING;
        const int wanted = threadIdx.x;
        int found = state;
        for (int i = length - 1; i >= OPENING - 1; --i) {
            if (i == max(wanted, OPENING - 1)) found = state;
            state = before_step(state, i);
        }
        if (wanted >= OPENING) return found;
        const int symbols = found & ((1 << OWN_BITS) - 1), own = BITS * (wanted + 1);
        return (head << own | symbols >> (OWN_BITS - own)) & (STATES - 1);
    }
};
