// One planted fault per case, and next to it what is allowed: the harness must report the first and not the second.
#include "ptx.cuh"

enum Case {
    FINE,
    UNWRITTEN,
    RACE_READ,
    RACE_WRITE_AFTER_READ,
    RACE_WRITE_AFTER_MANY_READS,
    RACE_IN_WARP,
    RACE_STATIC,
    LEFT_BEFORE_BARRIER,
    DIFFERENT_BARRIERS,
    LEFT_BEFORE_SHUFFLE,
    DIFFERENT_OPERATIONS,
    GLOBAL_WRITE_BEYOND,
    GLOBAL_READ_BEYOND,
    SHARED_BEYOND,
    STATIC_BEYOND,
    SHARED_DIRECTLY,
    NOT_SHARED,
    NO_WAIT,
    NO_COMMIT,
    WAIT_FOR_OLDER,
    WAIT_WITHOUT_BARRIER,
    COPY_OVER_READ,
    MISALIGNED_COPY,
    MISALIGNED_LOAD,
    MISALIGNED_VECTOR,
    MISALIGNED_SHARED,
    MISALIGNED_ROW,
    SHIFT_TOO_FAR,
    OTHER_BLOCKS_DATA,
    NO_END,
};

// input: 64 float32. output: 64 float32. 64 threads, 1024 bytes of dynamic shared memory, two blocks.
extern "C" __global__ void __launch_bounds__(64) fault(int fault, const float* __restrict__ input, float* output) {
    DYNAMIC_SHARED(dynamic);
    __shared__ float fixed[64];
    float* values = (float*)dynamic;
    const int self = threadIdx.x, lane = self % 32, other = self ^ 1;
    float result = 0;

    auto copy_in = [&] { cp_async16(values + 4 * self, input + self / 4 * 4, true); };

    switch (fault) {
        case FINE: {
            st_shared(values + self, input[self]);
            sync_warp();
            result = ld_shared(values + other);
            sync_block();
            st_shared(values + other, 1.0f);
            st_shared(fixed + self, result);
            sync_block();
            result = ld_shared(fixed + 63 - self) + ld_shared(values) + ld_shared(values + self);
            sync_block();
            cp_async16(dynamic + 16 * self, nullptr, false);  // never waited for, never read
            break;
        }
        case UNWRITTEN:
            if (self != 5) st_shared(values + self, 1.0f);
            sync_block();
            result = ld_shared(values + self);
            break;
        case RACE_READ:
            st_shared(values + self, 1.0f);
            sync_block();
            st_shared(values + self, 2.0f);
            result = ld_shared(values + 63 - self);
            break;
        case RACE_WRITE_AFTER_READ:
            st_shared(values + self, 1.0f);
            sync_block();
            result = ld_shared(values + (self ^ 32));
            st_shared(values + self, 2.0f);
            break;
        case RACE_WRITE_AFTER_MANY_READS:
            st_shared(values + self, 1.0f);
            sync_block();
            result = ld_shared(values);
            if (self == 63) st_shared(values, 2.0f);
            break;
        case RACE_IN_WARP:
            st_shared(values + self, 1.0f);
            sync_block();
            st_shared(values + self, 2.0f);
            result = ld_shared(values + other);
            break;
        case RACE_STATIC:
            st_shared(fixed + self / 2, 1.0f);
            break;
        case LEFT_BEFORE_BARRIER:
            if (self == 40) return;
            sync_block();
            break;
        case DIFFERENT_BARRIERS:
            if (self < 32)
                sync_block();
            else
                sync_block();
            break;
        case LEFT_BEFORE_SHUFFLE:
            if (self == 33) return;
            result = shuffle_xor(1.0f, 1);
            break;
        case DIFFERENT_OPERATIONS:
            if (lane == 7)
                sync_warp();
            else
                result = shuffle(1.0f, 0);
            break;
        case GLOBAL_WRITE_BEYOND:
            output[self + 1] = 1.0f;
            return;
        case GLOBAL_READ_BEYOND:
            result = input[self + 1];
            break;
        case SHARED_BEYOND:
            st_shared(values + 4 * self + 4, 1.0f);
            break;
        case STATIC_BEYOND:
            st_shared(fixed + self + 1, 1.0f);
            break;
        case SHARED_DIRECTLY:
            values[self] = 1.0f;
            break;
        case NOT_SHARED:
            result = ld_shared(input + self);
            break;
        case NO_WAIT:
            copy_in();
            cp_async_commit();
            sync_block();
            result = ld_shared(values + 4 * self);
            break;
        case NO_COMMIT:
            copy_in();
            cp_async_wait<0>();
            result = ld_shared(values + 4 * self);
            break;
        case WAIT_FOR_OLDER:
            copy_in();
            cp_async_commit();
            cp_async_wait<1>();
            result = ld_shared(values + 4 * self);
            break;
        case WAIT_WITHOUT_BARRIER:
            copy_in();
            cp_async_commit();
            cp_async_wait<0>();
            sync_warp();
            copy_in();
            cp_async_commit();
            cp_async_wait<0>();
            if (self & 1) result = ld_shared(values + 4 * other);
            break;
        case COPY_OVER_READ:
            st_shared(values + self, 1.0f);
            sync_block();
            result = ld_shared(values + 63 - self);
            if (self < 16) copy_in();
            break;
        case MISALIGNED_COPY:
            cp_async16(dynamic + 16 * self + 8, input, true);
            break;
        case MISALIGNED_LOAD:
            result = load_once((const uint4*)(input + 1)).x;
            break;
        case MISALIGNED_VECTOR:
            result = ((const float4*)(input + 1))->x;
            break;
        case MISALIGNED_SHARED:
            st_shared((uint2*)(dynamic + 8 * self + 4), make_uint2(0, 0));
            break;
        case MISALIGNED_ROW: {
            u32 fragment[4];
            st_shared(values + self, 1.0f);
            sync_block();
            ldmatrix_trans(fragment, dynamic + 8 * (lane % 8));
            break;
        }
        case SHIFT_TOO_FAR:
            result = (float)(1 << self);
            break;
        case OTHER_BLOCKS_DATA:
            if (blockIdx.x == 0) st_shared(fixed + self, 1.0f);
            sync_block();
            result = ld_shared(fixed + self);
            break;
        case NO_END:
            while (((volatile const float*)input)[0] == 0) {
            }
            break;
    }
    output[self] = result;
}
