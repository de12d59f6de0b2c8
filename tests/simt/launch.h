// Reads the arguments harness.py wrote, runs the grid, writes the buffers back.
//
// The file: int64 words (see Header), then a word with each buffer's size, three words per argument, and the buffers.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "ptx.cuh"

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

std::vector<Argument> read_arguments(const char* path, Header& header);
void run_grid(const Header& header, const char* kernel, void (*body)());
void write_buffers(const char* path);

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
    Header header;
    const std::vector<Argument> arguments = read_arguments(paths[1], header);
    Kernel::kernel = kernel;
    Kernel::take(arguments, std::index_sequence_for<P...>());
    run_grid(header, name, Kernel::body);
    write_buffers(paths[2]);
    return 0;
}

}  // namespace simt
