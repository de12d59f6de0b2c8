#include "levels.h"

#include <atomic>
#include <cstring>

#include "tiles.h"

#if defined(__x86_64__)
void multiply_vnni(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
void multiply_avx_vnni(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
void multiply_avx512vl_vnni(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
void multiply_trellis_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void multiply_trellis_int8_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void multiply_trellis_avx_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void multiply_trellis_int8_avx_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void multiply_trellis_avx512vl_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void multiply_trellis_int8_avx512vl_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
bool avx_vnni_runs_here();
void multiply_bfloat16(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
void multiply_rounded_bfloat16(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
void multiply_trellis_pairs(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*);
void load_kept_bfloat16(const Image*, const void*, uint16_t*);
void multiply_kept_bfloat16(const Image*, const Inputs&, const Outputs&, int64_t, int64_t);
#endif

namespace {

#if defined(__x86_64__)
bool avx512_vnni_runs_here() { return LEVEL_AVX512.runs_here() && __builtin_cpu_supports("avx512vnni"); }
#endif

struct Available {
  Level levels[8];
  int count = 0;

  void offer(Level candidate) {
    if (candidate.runs_here()) levels[count++] = candidate;
  }

  Available() {
    offer(LEVEL_SCALAR);
#if defined(__x86_64__)
    __builtin_cpu_init();
    offer(LEVEL_AVX2);
    Level short_vnni = LEVEL_AVX2;
    short_vnni.name = "avx2_vnni";
    short_vnni.by_int8 = avx_vnni_runs_here() ? multiply_avx_vnni : multiply_avx512vl_vnni;
    short_vnni.multiply_trellis = avx_vnni_runs_here() ? multiply_trellis_avx_vnni : multiply_trellis_avx512vl_vnni;
    short_vnni.multiply_trellis_int8 = avx_vnni_runs_here() ? multiply_trellis_int8_avx_vnni : multiply_trellis_int8_avx512vl_vnni;
    short_vnni.runs_here = [] { return LEVEL_AVX2.runs_here() && (avx_vnni_runs_here() || avx512_vnni_runs_here()); };
    offer(short_vnni);
    offer(LEVEL_AVX512);
    Level vnni = LEVEL_AVX512;
    vnni.name = "avx512_vnni";
    vnni.by_int8 = multiply_vnni;
    vnni.multiply_trellis = multiply_trellis_vnni;
    vnni.multiply_trellis_int8 = multiply_trellis_int8_vnni;
    vnni.runs_here = avx512_vnni_runs_here;
    offer(vnni);
    Level bfloat16 = vnni;
    bfloat16.name = "avx512_bf16";
    bfloat16.by_bfloat16 = multiply_bfloat16;
    bfloat16.by_rounded = multiply_rounded_bfloat16;
    bfloat16.multiply_trellis_pairs = multiply_trellis_pairs;
    bfloat16.rounded_from = 33;  // level with codes that are decoded for every 8 rows at 24 (8 bits) to 40 (4 bits)
    bfloat16.load_kept_bfloat16 = load_kept_bfloat16;
    bfloat16.by_kept_bfloat16 = multiply_kept_bfloat16;
    bfloat16.runs_here = [] {
      return avx512_vnni_runs_here() && __builtin_cpu_supports("avx512bf16");
    };
    offer(bfloat16);
    Level tiles = bfloat16;
    tiles.name = "avx512_amx";
    tiles.load_bfloat16 = load_for_tiles;
    tiles.by_tiles = multiply_tiles;
    tiles.by_rounded = multiply_rounded_tiles;
    tiles.rounded_from = TILE_ROWS + 1;
    tiles.runs_here = [] {
      return avx512_vnni_runs_here() && __builtin_cpu_supports("avx512bf16") && tiles_run_here();
    };
    offer(tiles);
#elif defined(__aarch64__)
    offer(LEVEL_NEON);
#endif
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<int> chosen{-1};

}  // namespace

int level_count() { return available().count; }
const Level& level_at(int index) { return available().levels[index]; }

const Level& level() {
  const int index = chosen.load(std::memory_order_relaxed);
  return level_at(index < 0 ? level_count() - 1 : index);
}

bool choose_level(const char* name) {
  for (int i = 0; i < level_count(); ++i)
    if (!std::strcmp(level_at(i).name, name)) {
      chosen = i;
      return true;
    }
  return false;
}
