// What 32 lanes do together, as one of them carries it out once all operands are there.
#pragma once

#include <type_traits>

#include "half.h"
#include "shadow.h"

namespace simt {

template <class V>
struct Shuffle {
    V value;
    int lane;  // whose value this lane gets
    V result;
};

template <class V>
void perform_shuffle(Thread* lanes) {
    for (int i = 0; i < 32; ++i) {
        auto& post = *(Shuffle<V>*)lanes[i].post;
        post.result = ((Shuffle<V>*)lanes[post.lane].post)->value;
    }
}

template <class V>
V shuffle_from(const char* operation, V value, int lane, Site site) {
    static_assert(std::is_arithmetic<V>::value && (sizeof(V) == 4 || sizeof(V) == 8), "what __shfl_sync takes");
    Shuffle<V> post = {value, lane, value};
    meet_warp(operation, site, &post, perform_shuffle<V>);
    return post.result;
}

struct MmaPost {
    float* d;
    const u32 *a, *b;
};

// Fragments to matrices and back, as ptx.cuh describes them.
template <class T>
void perform_mma(Thread* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& post = *(MmaPost*)lanes[lane].post;
        const int r = lane / 4, c = lane % 4 * 2;
        for (int side = 0; side < 2; ++side) {
            const int shift = 16 * side;
            for (int i = 0; i < 4; ++i) a[r + i % 2 * 8][c + i / 2 * 8 + side] = (float)decode<T>(post.a[i] >> shift & 0xffff);
            for (int i = 0; i < 2; ++i) b[c + i * 8 + side][r] = (float)decode<T>(post.b[i] >> shift & 0xffff);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& post = *(MmaPost*)lanes[lane].post;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) post.d[i] += a[row][k] * b[k][column];
        }
    }
}

struct LdmatrixPost {
    u32* result;
    const void* row;
    Site site;
};

// Each row counts as read by the lane that gives its address.
inline void perform_ldmatrix_trans(Thread* lanes) {
    u16 rows[32][8];
    Thread* self = current;
    for (int i = 0; i < 32; ++i) {
        const auto& post = *(LdmatrixPost*)lanes[i].post;
        current = &lanes[i];
        check_access("ldmatrix_trans", post.row, 16, 16, post.site);
        note_read(post.row, 16, post.site);
        copy_raw(rows[i], post.row, 16);
    }
    current = self;
    for (int i = 0; i < 32; ++i)
        for (int matrix = 0; matrix < 4; ++matrix) {
            const u16(*row)[8] = rows + matrix * 8 + i % 4 * 2;
            ((LdmatrixPost*)lanes[i].post)->result[matrix] = row[0][i / 4] | (u32)row[1][i / 4] << 16;
        }
}

inline void perform_nothing(Thread*) {}

}  // namespace simt
