// Reads the arguments harness.py wrote, runs the grid, writes the buffers back.
//
// The file: int64 words (see Header), then a word with each buffer's size, three words per argument, and the buffers.
#pragma once

#include <csignal>
#include <tuple>
#include <utility>

#include "host.h"

namespace simt {

struct Header {
    int64_t grid[3], block[3], shared, backwards, buffers, arguments;
};

struct Argument {
    int64_t kind;  // 'p', 'i' or 'f'; 'p' with buffer -1 is a null pointer
    int64_t value;  // number of the buffer; the int; the float's bits
    int64_t offset;  // bytes from the buffer's begin
};

struct Buffer {
    u8* memory;
    size_t size;
};

inline std::vector<Buffer> buffers;

inline void check_kind(const Argument& argument, char kind, int index) {
    if (argument.kind != kind)
        fail("argument %d is of kind '%c', the kernel's parameter of kind '%c' (p pointer, i int, f float)", index,
             (char)argument.kind, kind);
}

template <class P>
struct Parameter {
    static_assert(std::is_pointer<P>::value, "a kernel's parameters are pointers, int and float");
    static P from(const Argument& argument, int index) {
        check_kind(argument, 'p', index);
        return argument.value < 0 ? nullptr : (P)(buffers[argument.value].memory + argument.offset);
    }
};
template <>
struct Parameter<int> {
    static int from(const Argument& argument, int index) {
        check_kind(argument, 'i', index);
        return (int)argument.value;
    }
};
template <>
struct Parameter<float> {
    static float from(const Argument& argument, int index) {
        check_kind(argument, 'f', index);
        return __uint_as_float((u32)argument.value);
    }
};

inline void read_exactly(FILE* file, void* to, size_t size) {
    if (size && std::fread(to, 1, size, file) != size) fail("the file of arguments is too short");
}

inline std::vector<Argument> read_arguments(const char* path, Header& header) {
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

inline void write_buffers(const char* path) {
    FILE* file = std::fopen(path, "wb");
    if (!file) fail("cannot write %s", path);
    for (const Buffer& buffer : buffers)
        if (buffer.size && std::fwrite(buffer.memory, 1, buffer.size, file) != buffer.size) fail("cannot write %s", path);
    if (std::fclose(file)) fail("cannot write %s", path);
}

inline void run_grid(const Header& header) {
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

// The sanitizers abort after their report: add where the kernel was.
inline void at_abort(int) {
    print_place();
    std::fflush(stderr);
    _exit(1);
}

template <class... P>
struct Call {
    static inline void (*kernel)(P...);
    static inline std::tuple<P...> values;
    static void body() { std::apply(kernel, values); }

    template <size_t... I>
    static void take(const std::vector<Argument>& arguments, std::index_sequence<I...>) {
        if (arguments.size() != sizeof...(P))
            fail("%zu arguments for a kernel of %zu parameters", arguments.size(), sizeof...(P));
        values = {Parameter<P>::from(arguments[I], (int)I)...};
    }
};

template <class... P>
int launch(void (*kernel)(P...), const char* name, char** paths) {
    using Kernel = Call<P...>;
    std::signal(SIGABRT, at_abort);
    block.kernel = name;
    Header header;
    const std::vector<Argument> arguments = read_arguments(paths[1], header);
    Kernel::kernel = kernel;
    Kernel::take(arguments, std::index_sequence_for<P...>());
    block.body = Kernel::body;
    run_grid(header);
    write_buffers(paths[2]);
    return 0;
}

}  // namespace simt
