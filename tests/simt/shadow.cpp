#include "shadow.h"

#include <sanitizer/asan_interface.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <unordered_map>

extern "C" char __data_start, _end;  // the linker's: static variables lie between

namespace simt {

// When, as far as order goes. Barriers are counted over all blocks: a count before the block's first is another's.
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
static Dynamic dynamic_shared;

constexpr size_t page_size = 4096;
using Page = std::array<Cell, page_size>;
static std::unordered_map<size_t, std::unique_ptr<Page>> pages;

static Cell& cell_at(size_t address) {
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

static std::string name_byte(size_t address) {
    const size_t base = (size_t)dynamic_shared.memory;
    const bool dynamic = address - base < dynamic_shared.size;
    if (dynamic) return "byte " + std::to_string(address - base) + " of dynamic shared memory";
    char name[256] = "";
    void* start = nullptr;
    size_t size = 0;
    __asan_locate_address((void*)address, name, sizeof name, &start, &size);
    return "byte " + std::to_string(address - (size_t)start) + " of shared " + name;
}

// Alignment and bounds. Dynamic shared memory is poisoned, so that touching it in any other way than through the twins
// is an AddressSanitizer error: the bounds are checked here instead.
static void check_access(const char* what, const void* pointer, size_t size, size_t alignment, Site site) {
    const size_t address = (size_t)pointer, base = (size_t)dynamic_shared.memory;
    if (address % alignment)
        fail_at(site, "misaligned %s: the address must be a multiple of %zu", what, alignment);
    if (address >= base && address + size <= base + dynamic_shared.size) return;
    if (address >= (size_t)&__data_start && address + size <= (size_t)&_end) {
        if (void* bad = __asan_region_is_poisoned((void*)pointer, size))
            fail_at(site, "%s out of bounds: %s", what, name_byte((size_t)bad).c_str());
        return;
    }
    const long long offset = (long long)(address - base);
    if (offset > -(1 << 20) && offset < (1 << 20) && __asan_region_is_poisoned((void*)pointer, size))
        fail_at(site, "%s out of bounds: %zu bytes at byte %lld of %zu bytes of dynamic shared memory", what, size,
                offset, dynamic_shared.size);
    fail_at(site, "%s: the address is not in shared memory", what);
}

static Access access_now(Site site) {
    return {block.epoch, current_warp().epoch, (u16)current->number, (u16)site.line};
}

static bool same_warp(const Access& a, const Access& b) { return a.thread / 32 == b.thread / 32; }

static bool in_order(const Access& before, const Access& now) {
    if (before.thread == now.thread || before.epoch != now.epoch) return true;
    return same_warp(before, now) && before.warp_epoch != now.warp_epoch;
}

[[noreturn]] static void race(size_t address, const char* action, Site site, const char* other_action, Access other) {
    fail("race: thread %d %s %s (%s), which thread %d %s (line %d), with no barrier between", current->number, action,
         name_byte(address).c_str(), text(site).c_str(), other.thread, other_action, other.line);
}

static void check_not_in_flight(const Cell& cell, size_t address, const char* action, Site site) {
    if (cell.in_flight && cell.write.epoch >= block.first_epoch)
        fail("copy in flight: thread %d %s %s (%s), whose cp_async16 by thread %d (line %d) was not waited for",
             current->number, action, name_byte(address).c_str(), text(site).c_str(), cell.write.thread,
             cell.write.line);
}

// Two readers are enough: if they are of two warps, whoever writes races with one of them.
static void record_read(Cell& cell, const Access& now) {
    const Access before = cell.read;
    if (before.epoch != now.epoch) {
        cell.several = false;
    } else if (!in_order(before, now)) {
        const bool two_warps = cell.several && same_warp(before, now) && !same_warp(cell.other_read, now);
        if (!two_warps) cell.other_read = before;
        cell.several = true;
    }
    cell.read = now;
}

static void note_read(const void* pointer, size_t size, Site site) {
    const Access now = access_now(site);
    for (size_t address = (size_t)pointer; address < (size_t)pointer + size; ++address) {
        Cell& cell = cell_at(address);
        if (cell.write.epoch < block.first_epoch)
            fail("unwritten: thread %d reads %s (%s), which no thread of this block wrote", current->number,
                 name_byte(address).c_str(), text(site).c_str());
        check_not_in_flight(cell, address, "reads", site);
        if (!in_order(cell.write, now)) race(address, "reads", site, "wrote", cell.write);
        record_read(cell, now);
    }
}

static void note_write(const void* pointer, size_t size, Site site, bool in_flight = false) {
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
static void note_arrival(const Copy& copy) {
    for (size_t address = (size_t)copy.shared; address < (size_t)copy.shared + 16; ++address) {
        Cell& cell = cell_at(address);
        cell.write = access_now(copy.site);
        cell.in_flight = false;
    }
}

// Not memcpy and memset, by name or by the compiler's insight: AddressSanitizer's own refuse the poisoned memory.
static void copy_bytes(void* to, const void* from, size_t size) {
    for (size_t i = 0; i < size; ++i) ((volatile u8*)to)[i] = ((const u8*)from)[i];
}

void load_as(const char* what, void* value, const void* shared, size_t size, size_t alignment, Site site) {
    check_access(what, shared, size, alignment, site);
    note_read(shared, size, site);
    copy_bytes(value, shared, size);
}

void load(void* value, const void* shared, size_t size, size_t alignment, Site site) {
    load_as("ld_shared", value, shared, size, alignment, site);
}

void store(void* shared, const void* value, size_t size, size_t alignment, Site site) {
    check_access("st_shared", shared, size, alignment, site);
    note_write(shared, size, site);
    copy_bytes(shared, value, size);
}

void queue_copy(void* shared, const void* value, bool at_once, Site site) {
    check_access("cp_async16", shared, 16, 16, site);
    note_write(shared, 16, site, !at_once);
    if (at_once) {
        copy_bytes(shared, value, 16);
        return;
    }
    Copy copy = {shared, {}, current->groups, site};
    copy_bytes(copy.value, value, 16);
    current->copies.push_back(copy);
}

void commit_copies() { ++current->groups; }

void wait_for_copies(int pending) {
    auto& copies = current->copies;
    size_t arrived = 0;
    for (; arrived < copies.size() && copies[arrived].group < current->groups - pending; ++arrived) {
        copy_bytes(copies[arrived].shared, copies[arrived].value, 16);
        note_arrival(copies[arrived]);
    }
    copies.erase(copies.begin(), copies.begin() + (long)arrived);
}

u8* dynamic_memory() { return dynamic_shared.memory; }

void make_dynamic(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, size)) fail("no memory for %zu bytes of shared memory", size);
    dynamic_shared = {(u8*)memory, size};
    __asan_poison_memory_region(memory, size);
}

// NaNs in every format.
void forget_dynamic() {
    for (size_t i = 0; i < dynamic_shared.size; ++i) ((volatile u8*)dynamic_shared.memory)[i] = 0xff;
}

}  // namespace simt
