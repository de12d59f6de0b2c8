#include "launch.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "shadow.h"

namespace simt {

static void read_exactly(FILE* file, void* to, size_t size) {
    if (size && std::fread(to, 1, size, file) != size) fail("the file of arguments is too short");
}

std::vector<Argument> read_arguments(const char* path, Header& header) {
    FILE* file = std::fopen(path, "rb");
    if (!file) fail("cannot open %s", path);
    read_exactly(file, &header, sizeof header);
    std::vector<int64_t> sizes(header.buffers);
    std::vector<Argument> arguments(header.arguments);
    read_exactly(file, sizes.data(), sizes.size() * sizeof(int64_t));
    read_exactly(file, arguments.data(), arguments.size() * sizeof(Argument));
    for (const int64_t size : sizes) {
        void* memory = nullptr;  // aligned as an allocation of CUDA is, and no byte longer than the tensor's storage
        if (posix_memalign(&memory, 256, size)) fail("no memory for a buffer of %lld bytes", (long long)size);
        read_exactly(file, memory, size);
        buffers.push_back({(u8*)memory, (size_t)size});
    }
    std::fclose(file);
    return arguments;
}

void write_buffers(const char* path) {
    FILE* file = std::fopen(path, "wb");
    if (!file) fail("cannot write %s", path);
    for (const Buffer& buffer : buffers) {
        const size_t written = buffer.size ? std::fwrite(buffer.memory, 1, buffer.size, file) : 0;
        if (written != buffer.size) fail("cannot write %s", path);
    }
    if (std::fclose(file)) fail("cannot write %s", path);
}

// The sanitizers abort after their report: add where the kernel was.
static void at_abort(int) {
    print_place();
    std::fflush(stderr);
    _exit(1);
}

void run_grid(const Header& header, const char* kernel, void (*body)()) {
    std::signal(SIGABRT, at_abort);
    block.kernel = kernel;
    block.body = body;
    gridDim = {(u32)header.grid[0], (u32)header.grid[1], (u32)header.grid[2]};
    blockDim = {(u32)header.block[0], (u32)header.block[1], (u32)header.block[2]};
    block.backwards = header.backwards;
    make_dynamic(header.shared);
    make_threads();
    const u32 count = gridDim.x * gridDim.y * gridDim.z;
    for (u32 turn = 0; turn < count; ++turn) {
        const u32 i = block.backwards ? count - 1 - turn : turn;
        blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
        forget_dynamic();
        run_block();
    }
}

}  // namespace simt
