// A record of every byte of shared memory: who wrote it and who read it since the last barrier.
//
// Two accesses of one byte by different threads are in order if a sync_block lies between them or, in one warp, an
// operation that all its lanes take part in; if not, and one of them is a write, they race.
#pragma once

#include <sanitizer/asan_interface.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_map>

#include "fiber.h"

extern "C" char __data_start, _end;  // the linker's: static variables lie between

#define SIMT_RAW __attribute__((no_sanitize("address", "undefined")))

namespace simt {

// When, as far as order goes. Barriers are counted over all blocks: a count before the block's first is another block's.
struct Access {
    u32 epoch, warp_epoch;
    u16 thread, line;
};

struct Cell {
    Access write, read, other_read;
    bool in_flight;  // by a cp_async16 that nobody waited for yet
    bool several;    // other_read, by another thread, counts too
};

struct Dynamic {
    u8* memory = nullptr;
    size_t size = 0;
};
inline Dynamic dynamic_shared;

constexpr size_t page_size = 4096;
using Page = std::array<Cell, page_size>;
inline std::unordered_map<size_t, std::unique_ptr<Page>> pages;

SIMT_RAW inline Cell& cell_at(size_t address) {
    static size_t last = 0;
    static Page* page = nullptr;
    if (address / page_size != last) {
        last = address / page_size;
        auto& slot = pages[last];
        if (!slot) slot = std::make_unique<Page>();
        page = slot.get();
    }
    return page->data()[address % page_size];
}

inline std::string name_byte(size_t address) {
    const size_t base = (size_t)dynamic_shared.memory;
    if (address - base < dynamic_shared.size) return "byte " + std::to_string(address - base) + " of dynamic shared memory";
    char name[256] = "";
    void* start = nullptr;
    size_t size = 0;
    __asan_locate_address((void*)address, name, sizeof name, &start, &size);
    return "byte " + std::to_string(address - (size_t)start) + " of shared " + name;
}

// Alignment and bounds. Dynamic shared memory is poisoned, so that touching it in any other way than through the twins
// is an AddressSanitizer error: the bounds are checked here instead.
inline void check_access(const char* what, const void* pointer, size_t size, size_t alignment, Site site) {
    const size_t address = (size_t)pointer, base = (size_t)dynamic_shared.memory;
    if (address % alignment)
        fail("misaligned %s (%s): the address must be a multiple of %zu", what, site.text().c_str(), alignment);
    if (address >= base && address + size <= base + dynamic_shared.size) return;
    if (address >= (size_t)&__data_start && address + size <= (size_t)&_end) {
        if (void* bad = __asan_region_is_poisoned((void*)pointer, size))
            fail("%s out of bounds (%s): %s", what, site.text().c_str(), name_byte((size_t)bad).c_str());
        return;
    }
    const long long offset = (long long)(address - base);
    if (offset > -(1 << 20) && offset < (1 << 20))
        fail("%s out of bounds (%s): %zu bytes at byte %lld of %zu bytes of dynamic shared memory", what,
             site.text().c_str(), size, offset, dynamic_shared.size);
    fail("%s (%s): the address is not in shared memory", what, site.text().c_str());
}

SIMT_RAW inline Access access_now(Site site) {
    return {block.epoch, current_warp().epoch, (u16)current->number, (u16)site.line};
}

SIMT_RAW inline bool same_warp(const Access& a, const Access& b) { return a.thread / 32 == b.thread / 32; }

SIMT_RAW inline bool in_order(const Access& before, const Access& now) {
    if (before.thread == now.thread || before.epoch != now.epoch) return true;
    return same_warp(before, now) && before.warp_epoch != now.warp_epoch;
}

[[noreturn]] inline void race(size_t address, const char* action, Site site, const char* other_action, Access other) {
    fail("race: thread %d %s %s (%s), which thread %d %s (line %d), with no barrier between", current->number, action,
         name_byte(address).c_str(), site.text().c_str(), other.thread, other_action, other.line);
}

SIMT_RAW inline void check_not_in_flight(const Cell& cell, size_t address, const char* action, Site site) {
    if (cell.in_flight && cell.write.epoch >= block.first_epoch)
        fail("copy in flight: thread %d %s %s (%s), whose cp_async16 by thread %d (line %d) was not waited for",
             current->number, action, name_byte(address).c_str(), site.text().c_str(), cell.write.thread,
             cell.write.line);
}

// Two readers are enough: if they are of two warps, whoever writes races with one of them.
SIMT_RAW inline void record_read(Cell& cell, const Access& now) {
    const Access before = cell.read;
    if (before.epoch != now.epoch) {
        cell.several = false;
    } else if (!in_order(before, now) && !(cell.several && same_warp(before, now) && !same_warp(cell.other_read, now))) {
        cell.other_read = before;
        cell.several = true;
    }
    cell.read = now;
}

SIMT_RAW inline void note_read(const void* pointer, size_t size, Site site) {
    const Access now = access_now(site);
    for (size_t address = (size_t)pointer; address < (size_t)pointer + size; ++address) {
        Cell& cell = cell_at(address);
        if (cell.write.epoch < block.first_epoch)
            fail("unwritten: thread %d reads %s (%s), which no thread of this block wrote", current->number,
                 name_byte(address).c_str(), site.text().c_str());
        check_not_in_flight(cell, address, "reads", site);
        if (!in_order(cell.write, now)) race(address, "reads", site, "wrote", cell.write);
        record_read(cell, now);
    }
}

SIMT_RAW inline void note_write(const void* pointer, size_t size, Site site, bool in_flight = false) {
    const Access now = access_now(site);
    for (size_t address = (size_t)pointer; address < (size_t)pointer + size; ++address) {
        Cell& cell = cell_at(address);
        check_not_in_flight(cell, address, "writes", site);
        if (!in_order(cell.write, now)) race(address, "writes", site, "wrote", cell.write);
        if (!in_order(cell.read, now)) race(address, "writes", site, "read", cell.read);
        if (cell.several && !in_order(cell.other_read, now)) race(address, "writes", site, "read", cell.other_read);
        cell.write = now;
        cell.in_flight = in_flight;
    }
}

// The thread that queued a copy waited for it: other threads see it after the next barrier.
SIMT_RAW inline void note_arrival(const Copy& copy) {
    for (size_t address = (size_t)copy.shared; address < (size_t)copy.shared + 16; ++address) {
        Cell& cell = cell_at(address);
        cell.write = access_now(copy.site);
        cell.in_flight = false;
    }
}

SIMT_RAW inline void copy_raw(void* to, const void* from, size_t size) {
    for (size_t i = 0; i < size; ++i) ((volatile u8*)to)[i] = ((const u8*)from)[i];
}

// NaNs in every format: what a block reads before it writes is reported, what it never checks is seen in its results.
SIMT_RAW inline void forget_dynamic() {
    for (size_t i = 0; i < dynamic_shared.size; ++i) ((volatile u8*)dynamic_shared.memory)[i] = 0xff;
}

inline void make_dynamic(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, size)) fail("no memory for %zu bytes of shared memory", size);
    dynamic_shared = {(u8*)memory, size};
    __asan_poison_memory_region(memory, size);
}

}  // namespace simt
