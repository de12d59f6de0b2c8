// The threads of one block as fibers on one CPU thread: each runs until it must wait for others.
//
// A warp operation completes when all 32 lanes arrived at the same call; a barrier when all threads of the block did.
// What never completes is found when no thread can run any more, and reported with who waits where.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "ptx.cuh"

namespace simt {

struct Copy {
    void* shared;
    u8 value[16];
    int group;
    Site site;
};

enum class State { ready, at_barrier, at_warp_operation, left };

struct Stack {
    void* pointer = nullptr;  // where the registers of a waiting fiber lie
    void* fake = nullptr;     // AddressSanitizer's
    const void* bottom = nullptr;
    size_t size = 0;
};

struct Thread {
    int number = 0;
    uint3 index = {};
    State state = State::left;
    const char* operation = nullptr;
    Site site;
    void* post = nullptr;  // operands and results of the warp operation
    Stack stack;
    std::vector<Copy> copies;  // queued by cp_async16
    int groups = 0;            // committed so far
};

struct Warp {
    int arrived = 0;
    u32 epoch = 0;
};

struct Block {
    const char* kernel = "";
    void (*body)() = nullptr;  // calls the kernel with its arguments
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::deque<Thread*> ready;
    int at_barrier = 0, left = 0;
    u32 epoch = 0, first_epoch = 0;  // barriers passed, over all blocks; as this block began
    bool backwards = false;          // blocks and threads take turns from the last to the first
};

inline Block block;
inline Thread* current = nullptr;

inline Warp& current_warp() { return block.warps[current->number / 32]; }
std::string text(Site site);
void print_place();

// perform is called once, when the posts of all lanes are there.
void meet_warp(const char* operation, Site site, void* post, void (*perform)(Thread* lanes));

void make_threads();
void run_block();

}  // namespace simt
