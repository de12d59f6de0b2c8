#include "fiber.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace simt {

static Stack main_stack;
static Stack* running = &main_stack;

std::string text(Site site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

static bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

void print_place() {
    std::fprintf(stderr, "  in kernel %s, block (%u, %u, %u)", block.kernel, blockIdx.x, blockIdx.y, blockIdx.z);
    if (current) std::fprintf(stderr, ", thread %d", current->number);
    std::fprintf(stderr, "\n");
}

[[noreturn]] static void finish_report(const char* format, va_list values, const std::string& where) {
    std::fprintf(stderr, "simt: ");
    std::vfprintf(stderr, format, values);
    std::fprintf(stderr, "%s\n", where.c_str());
    print_place();
    std::fflush(stderr);
    _exit(1);
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    finish_report(format, values, "");
}

void fail_at(Site site, const char* format, ...) {
    va_list values;
    va_start(values, format);
    finish_report(format, values, " (" + text(site) + ")");
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

static void switch_to(Stack& to) {
    Stack& from = *running;
    running = &to;
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
    simt_switch(&from.pointer, to.pointer);
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

// Ranges of threads that do the same, one line each.
static void print_threads() {
    const auto& threads = block.threads;
    const int count = (int)threads.size();
    for (int first = 0, last; first < count; first = last) {
        const Thread& one = threads[first];
        const bool waits = one.state == State::at_barrier || one.state == State::at_warp_operation;
        for (last = first + 1; last < count; ++last) {
            const Thread& next = threads[last];
            if (next.state != one.state) break;
            if (waits && (std::strcmp(next.operation, one.operation) || !same(next.site, one.site))) break;
        }
        if (last == first + 1)
            std::fprintf(stderr, "  thread %d ", first);
        else
            std::fprintf(stderr, "  threads %d-%d ", first, last - 1);
        if (waits)
            std::fprintf(stderr, "at %s (%s)\n", one.operation, text(one.site).c_str());
        else
            std::fprintf(stderr, one.state == State::left ? "left the kernel\n" : "still on the way\n");
    }
}

[[noreturn]] static void diverged(const char* what) {
    current = nullptr;
    std::fprintf(stderr, "simt: %s\n", what);
    print_threads();
    print_place();
    std::fflush(stderr);
    _exit(1);
}

[[noreturn]] static void stuck() {
    for (const Thread& thread : block.threads)
        if (thread.state == State::at_warp_operation) diverged("warp divergence: not all 32 lanes take part");
    diverged("barrier divergence: not all threads of the block arrive");
}

static void run_next() {
    if (block.ready.empty()) stuck();
    current = block.ready.front();
    block.ready.pop_front();
    threadIdx = current->index;
    if (&current->stack != running) switch_to(current->stack);
}

// All of them may run again; the thread that completed the operation queues up like the others.
static void release(Thread* threads, int count) {
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[block.backwards ? count - 1 - i : i];
        thread.state = State::ready;
        block.ready.push_back(&thread);
    }
}

void meet_block(Site site) {
    current->state = State::at_barrier;
    current->operation = "sync_block";
    current->site = site;
    if (++block.at_barrier == (int)block.threads.size()) {
        for (const Thread& thread : block.threads)
            if (!same(thread.site, site)) diverged("barrier divergence: threads wait at different barriers");
        block.at_barrier = 0;
        ++block.epoch;
        release(block.threads.data(), (int)block.threads.size());
    }
    run_next();
}

int current_lane() { return current->number % 32; }

void meet_warp(const char* operation, Site site, void* post, void (*perform)(Thread* lanes)) {
    Warp& warp = current_warp();
    current->state = State::at_warp_operation;
    current->operation = operation;
    current->site = site;
    current->post = post;
    if (++warp.arrived == 32) {
        Thread* lanes = &block.threads[current->number / 32 * 32];
        for (int i = 0; i < 32; ++i)
            if (std::strcmp(lanes[i].operation, operation) || !same(lanes[i].site, site))
                diverged("warp divergence: lanes of one warp at different operations");
        perform(lanes);
        warp.arrived = 0;
        ++warp.epoch;
        release(lanes, 32);
    }
    run_next();
}

// A fiber outlives its block: the next block's thread of the same number runs on the same stack.
[[noreturn]] static void fiber_main() {
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

static void make_stack(Stack& stack) {
    const size_t page = 4096, size = 256 * 1024;
    char* memory = (char*)mmap(nullptr, page + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) fail("no memory for a stack");
    void** top = (void**)(memory + page + size);
    top[-2] = (void*)fiber_main;  // where simt_switch returns to; six registers below, no caller above
    stack.pointer = top - 8;
    stack.bottom = memory + page;
    stack.size = size;
}

void make_threads() {
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

void run_block() {
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
