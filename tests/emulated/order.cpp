// Who comes after whom, and the accesses that nothing orders. machine.cpp says what the clocks mean.
#include "state.h"

namespace emulated {

__attribute__((target_clones("avx2", "default"))) void join(uint32_t* to, const uint32_t* from, size_t num) {
  for (size_t i = 0; i < num; ++i) to[i] = std::max(to[i], from[i]);
}
void join(Clock& to, const Clock& from) { join(to.data(), from.data(), m.used_places); }

// ---- clocks

void tick(Thread* t) {
  ++t->clocks.seen[t->index];
  t->clocks.known[t->index] = t->clocks.seen[t->index];
}

Snapshot snapshot(Thread* t) {
  if (t->dirty || t->cached == nullptr) {
    t->cached = std::make_shared<const Clocks>(t->clocks);
    t->dirty = false;
    tick(t);
  }
  return t->cached;
}

int new_place() {
  if (m.used_places == m.places) fail("more barriers and copying threads than the clocks have places for");
  return static_cast<int>(m.used_places++);
}

void meet(Meeting& meeting, int count, bool only_known, const std::function<void()>& last) {
  Thread* t = m.now;
  if (m.checks) {
    if (meeting.count == 0) {
      meeting.clocks = Clocks{};
      meeting.clocks.grow(m.places);
    }
    if (only_known) {
      join(meeting.clocks.known, t->clocks.known);
    } else {
      meeting.clocks.join_all(t->clocks);
    }
  }
  const auto take = [&](Thread* who) {
    if (!m.checks) return;
    if (only_known) {
      join(who->clocks.known, meeting.clocks.known);
    } else {
      who->clocks.join_all(meeting.clocks);
    }
    tick(who);
    who->dirty = true;
  };
  if (++meeting.count < count) {
    sleep_in(meeting.waiting);
    return;
  }
  meeting.count = 0;
  if (last) last();
  take(t);
  for (Thread* who : meeting.waiting) take(who);
  wake(meeting.waiting);
}

// ---- races

bool is_private(const void* address) {  // stacks, with what kernels are given
  return static_cast<const uint8_t*>(address) - m.stacks < static_cast<int64_t>(m.stacks_bytes) &&
         static_cast<const uint8_t*>(address) >= m.stacks;
}

Cell& cell(uint64_t address) {
  auto& page = m.pages[address >> 12];
  if (page == nullptr) page = std::make_unique<Cell[]>(4096);
  return page[address & 4095];
}

void found(int kind, uint64_t address, const Access& before, uint64_t code) {
  auto& one = m.races[{kind, before.code, code}];
  if (one.first++ != 0) return;
  const Thread* t = m.now;
  char text[256];
  std::snprintf(text, sizeof(text), "%s of %s memory 0x%lx, block %d thread %d of a kernel of %s",
                kind == 0   ? "load after store"
                : kind == 1 ? "store after store"
                            : "store after load",
                address - kSharedBase < kSharedBytes ? "shared" : "global", static_cast<unsigned long>(address),
                static_cast<int>(t->place.block.x), static_cast<int>(t->place.thread.x),
                t->block->kernel->name.c_str());
  one.second = text;
}

void load_as(const void* from, uint32_t bytes, const As& who, const Clock& seen) {
  const uint64_t start = reinterpret_cast<uint64_t>(from);
  for (uint64_t at = start; at < start + bytes; ++at) {
    Cell& c = cell(at);
    if (c.store.time > seen[c.store.place]) found(0, at, c.store, who.code);
    auto same = std::find_if(c.loads.begin(), c.loads.end(), [&](const Access& a) { return a.place == who.place; });
    if (same == c.loads.end()) {
      c.loads.push_back({who.place, who.time, who.code});
    } else {
      *same = {who.place, who.time, who.code};
    }
  }
}

void store_as(void* to, uint32_t bytes, const As& who, const Clock& seen, const Clock& known) {
  const uint64_t start = reinterpret_cast<uint64_t>(to);
  for (uint64_t at = start; at < start + bytes; ++at) {
    Cell& c = cell(at);
    if (c.store.time > seen[c.store.place]) found(1, at, c.store, who.code);
    for (const Access& a : c.loads) {
      if (a.time > known[a.place]) found(2, at, a, who.code);
    }
    c.loads.clear();
    c.store = {who.place, who.time, who.code};
  }
}

void plain(const void* address, int bytes, bool stores, uint64_t code) {
  if (!m.checks || m.now == nullptr || is_private(address)) return;
  Thread* t = m.now;
  t->dirty = true;
  const As who{static_cast<uint32_t>(t->index), t->clocks.seen[t->index], code};
  if (stores) {
    store_as(const_cast<void*>(address), bytes, who, t->clocks.seen, t->clocks.known);
  } else {
    load_as(address, bytes, who, t->clocks.seen);
  }
}

// ---- words

void released(Word& word, Thread* t, bool joins) {
  const Snapshot now = snapshot(t);
  const auto put = [&](Snapshot& old, const Snapshot& made) {
    if (!joins || old == nullptr || old == made) {
      if (made != nullptr || !joins) old = made;
    } else if (made != nullptr) {
      auto both = std::make_shared<Clocks>(*old);
      both->join_all(*made);
      old = both;
    }
  };
  for (int scope = 0; scope < 3; ++scope) put(word.released[scope], t->fenced[scope]);
  put(word.now, now);
  word.writer = t->block;
}

void acquired(const Word& word, Thread* t) {
  if (word.now == nullptr) return;
  const int scope = word.writer == t->block                                   ? kBlock
                    : word.writer->kernel->stream == t->block->kernel->stream ? kDevice
                                                                              : kSystem;
  join(t->clocks.known, word.now->known);
  if (word.released[scope] != nullptr) {
    join(t->clocks.seen, word.released[scope]->seen);
    join(t->clocks.known, word.released[scope]->seen);
  }
  t->dirty = true;
}

void fence(Scope scope) {
  if (!m.checks) return;
  Thread* t = m.now;
  t->dirty = true;
  const Snapshot now = snapshot(t);
  for (int covered = 0; covered <= scope; ++covered) t->fenced[covered] = now;
}

void fence_proxy() {
  if (!m.checks) return;
  m.now->clocks.proxied = m.now->clocks.seen;
  m.now->dirty = true;
}

void reads(const void* address, int bytes) { plain(address, bytes, false, CODE); }
void writes(const void* address, int bytes) { plain(address, bytes, true, CODE); }

// ---- barriers of threads

void sync_warp() { meet(m.now->warp->order, 32, false); }
void sync_named(int id, int num_threads) { meet(m.now->block->barriers[id], num_threads, false); }

const uint64_t* exchange(uint64_t mine) {
  Warp* warp = m.now->warp;
  warp->in[m.now->place.thread.x % 32] = mine;
  meet(warp->values, 32, true, [warp] { std::copy(warp->in, warp->in + 32, warp->out); });
  return warp->out;
}

}  // namespace emulated

// What the compiler calls at every access of a kernel.
#define ACCESS(name, bytes, stores) \
  extern "C" void __tsan_##name(void* address) { emulated::plain(address, bytes, stores, CODE); }
#define SIZES(prefix)               \
  ACCESS(prefix##read1, 1, false)   \
  ACCESS(prefix##read2, 2, false)   \
  ACCESS(prefix##read4, 4, false)   \
  ACCESS(prefix##read8, 8, false)   \
  ACCESS(prefix##read16, 16, false) \
  ACCESS(prefix##write1, 1, true)   \
  ACCESS(prefix##write2, 2, true)   \
  ACCESS(prefix##write4, 4, true)   \
  ACCESS(prefix##write8, 8, true)   \
  ACCESS(prefix##write16, 16, true)
SIZES()
SIZES(unaligned_)
SIZES(volatile_)
SIZES(unaligned_volatile_)
extern "C" void __tsan_read_range(void* address, long bytes) { emulated::plain(address, bytes, false, CODE); }
extern "C" void __tsan_write_range(void* address, long bytes) { emulated::plain(address, bytes, true, CODE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
