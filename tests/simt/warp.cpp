// What 32 lanes do together, as one of them carries it out once all operands are there.
#include "fiber.h"
#include "shadow.h"

namespace simt {

struct Exchange {
    u64 bits;
    int from_lane;
    u64 result;
};

static void perform_exchange(Thread* lanes) {
    for (int i = 0; i < 32; ++i) {
        auto& post = *(Exchange*)lanes[i].post;
        post.result = ((Exchange*)lanes[post.from_lane].post)->bits;
    }
}

u64 exchange(const char* operation, u64 bits, int from_lane, Site site) {
    Exchange post = {bits, from_lane, 0};
    meet_warp(operation, site, &post, perform_exchange);
    return post.result;
}

struct Fragments {
    float* d;
    const u32 *a, *b;
};

// Fragments to matrices and back, as ptx.cuh describes them.
template <class T>
static void perform_multiply(Thread* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& post = *(Fragments*)lanes[lane].post;
        const int r = lane / 4, c = lane % 4 * 2;
        auto half = [](u32 pair, int side) { return (float)decode<T>(pair >> 16 * side & 0xffff); };
        for (int side = 0; side < 2; ++side) {
            for (int i = 0; i < 4; ++i) a[r + i % 2 * 8][c + i / 2 * 8 + side] = half(post.a[i], side);
            for (int i = 0; i < 2; ++i) b[c + i * 8 + side][r] = half(post.b[i], side);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& post = *(Fragments*)lanes[lane].post;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) post.d[i] += a[row][k] * b[k][column];
        }
    }
}

template <class T>
void multiply(float* d, const u32* a, const u32* b, Site site) {
    Fragments post = {d, a, b};
    meet_warp("mma", site, &post, perform_multiply<T>);
}
template void multiply<Half>(float*, const u32*, const u32*, Site);
template void multiply<Bfloat>(float*, const u32*, const u32*, Site);

struct Rows {
    u32* result;
    const void* row;
    Site site;
};

// Each row counts as read by the lane that gives its address.
static void perform_load_rows(Thread* lanes) {
    u16 rows[32][8];
    Thread* self = current;
    for (int i = 0; i < 32; ++i) {
        const auto& post = *(Rows*)lanes[i].post;
        current = &lanes[i];
        load_as("ldmatrix_trans", rows[i], post.row, 16, 16, post.site);
    }
    current = self;
    for (int i = 0; i < 32; ++i)
        for (int matrix = 0; matrix < 4; ++matrix) {
            const u16(*row)[8] = rows + matrix * 8 + i % 4 * 2;
            ((Rows*)lanes[i].post)->result[matrix] = row[0][i / 4] | (u32)row[1][i / 4] << 16;
        }
}

void load_rows_transposed(u32* result, const void* row, Site site) {
    Rows post = {result, row, site};
    meet_warp("ldmatrix_trans", site, &post, perform_load_rows);
}

void meet_warp(Site site) {
    meet_warp("sync_warp", site, nullptr, [](Thread*) {});
}

}  // namespace simt
