// The threads of one block as fibers on one CPU thread: each runs until it must wait for others.
//
// A warp operation completes when all 32 lanes arrived at the same call; a barrier when all threads of the block did.
// What never completes is found when no thread can run any more, and reported with who waits where.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

struct uint3 {
    u32 x, y, z;
};

// Of the thread that runs now.
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// Where the kernel's source calls one of the twins: as a default argument it is the caller's line.
struct Site {
    const char* file;
    int line;
    Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
    bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
    std::string text() const {
        const char* slash = std::strrchr(file, '/');
        return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
    }
};

struct Copy {
    void* shared;
    u64 words[2];
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
inline Stack main_stack;
inline Stack* running = &main_stack;

inline void print_place() {
    std::fprintf(stderr, "  in kernel %s, block (%u, %u, %u)", block.kernel, blockIdx.x, blockIdx.y, blockIdx.z);
    if (current) std::fprintf(stderr, ", thread %d", current->number);
    std::fprintf(stderr, "\n");
}

[[noreturn]] inline void fail(const char* format, ...) {
    std::fprintf(stderr, "simt: ");
    va_list values;
    va_start(values, format);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fprintf(stderr, "\n");
    print_place();
    std::fflush(stderr);
    _exit(1);
}

// Not swapcontext: AddressSanitizer's version of it clears its record of the whole stack at each switch.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void simt_switch(void** save, void* load);

inline void switch_to(Stack& to) {
    Stack& from = *running;
    running = &to;
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
    simt_switch(&from.pointer, to.pointer);
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

// Ranges of threads that do the same, one line each.
inline void print_threads() {
    const auto& threads = block.threads;
    const int count = (int)threads.size();
    for (int first = 0, last; first < count; first = last) {
        const Thread& one = threads[first];
        const bool left = one.state == State::left;
        for (last = first + 1; last < count; ++last) {
            const Thread& next = threads[last];
            if (next.state != one.state) break;
            if (!left && (std::strcmp(next.operation, one.operation) || !(next.site == one.site))) break;
        }
        if (last == first + 1)
            std::fprintf(stderr, "  thread %d ", first);
        else
            std::fprintf(stderr, "  threads %d-%d ", first, last - 1);
        if (left)
            std::fprintf(stderr, "left the kernel\n");
        else
            std::fprintf(stderr, "at %s (%s)\n", one.operation, one.site.text().c_str());
    }
}

[[noreturn]] inline void diverged(const char* what) {
    current = nullptr;
    std::fprintf(stderr, "simt: %s\n", what);
    print_threads();
    print_place();
    std::fflush(stderr);
    _exit(1);
}

[[noreturn]] inline void stuck() {
    for (const Thread& thread : block.threads)
        if (thread.state == State::at_warp_operation) diverged("warp divergence: not all 32 lanes take part");
    diverged("barrier divergence: not all threads of the block arrive");
}

inline void run_next() {
    if (block.ready.empty()) stuck();
    current = block.ready.front();
    block.ready.pop_front();
    current->state = State::ready;
    threadIdx = current->index;
    if (&current->stack != running) switch_to(current->stack);
}

// All of them may run again; the thread that completed the operation queues up like the others.
inline void release(Thread* threads, int count) {
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[block.backwards ? count - 1 - i : i];
        block.ready.push_back(&thread);
    }
}

inline void meet_block(Site site) {
    current->state = State::at_barrier;
    current->operation = "sync_block";
    current->site = site;
    if (++block.at_barrier == (int)block.threads.size()) {
        for (const Thread& thread : block.threads)
            if (!(thread.site == site)) diverged("barrier divergence: threads wait at different barriers");
        block.at_barrier = 0;
        ++block.epoch;
        release(block.threads.data(), (int)block.threads.size());
    }
    run_next();
}

inline Warp& current_warp() { return block.warps[current->number / 32]; }

// perform is called once, when the posts of all lanes are there.
inline void meet_warp(const char* operation, Site site, void* post, void (*perform)(Thread* lanes)) {
    Warp& warp = current_warp();
    current->state = State::at_warp_operation;
    current->operation = operation;
    current->site = site;
    current->post = post;
    if (++warp.arrived == 32) {
        Thread* lanes = &block.threads[current->number / 32 * 32];
        for (int i = 0; i < 32; ++i)
            if (std::strcmp(lanes[i].operation, operation) || !(lanes[i].site == site))
                diverged("warp divergence: lanes of one warp at different operations");
        perform(lanes);
        warp.arrived = 0;
        ++warp.epoch;
        release(lanes, 32);
    }
    run_next();
}

// A fiber outlives its block: the next block's thread of the same number runs on the same stack.
[[noreturn]] inline void fiber_main() {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_stack.bottom) {  // the first fiber is entered from main
        main_stack.bottom = bottom;
        main_stack.size = size;
    }
    for (;;) {
        block.body();
        current->state = State::left;
        if (++block.left == (int)block.threads.size()) {
            current = nullptr;
            switch_to(main_stack);
        } else {
            run_next();
        }
    }
}

inline void make_stack(Stack& stack) {
    const size_t page = 4096, size = 256 * 1024;
    char* memory = (char*)mmap(nullptr, page + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) fail("no memory for a stack");
    void** top = (void**)(memory + page + size);
    top[-2] = (void*)fiber_main;  // where simt_switch returns to; six registers below, no caller above
    stack.pointer = top - 8;
    stack.bottom = memory + page;
    stack.size = size;
}

inline void make_threads() {
    const int count = (int)(blockDim.x * blockDim.y * blockDim.z);
    block.threads.resize(count);
    block.warps.resize(count / 32);
    for (int i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.number = i;
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        make_stack(thread.stack);
    }
}

inline void run_block() {
    block.first_epoch = ++block.epoch;
    block.left = 0;
    for (Thread& thread : block.threads) {
        thread.copies.clear();
        thread.groups = 0;
    }
    release(block.threads.data(), (int)block.threads.size());
    run_next();
}

}  // namespace simt
