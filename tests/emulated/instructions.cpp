// Instructions: shared memory, words, copies that go on by themselves, and their barriers.
#include <sys/mman.h>

#include "state.h"

namespace emulated {
namespace {

uint8_t* arena() {
  static uint8_t* memory = [] {
    void* got = mmap(reinterpret_cast<void*>(uint64_t{kSharedBase}), kSharedBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::runtime_error("emulated: no room for shared memory below 4 GiB");
    return static_cast<uint8_t*>(got);
  }();
  return memory;
}

void complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  if (m.checks) {
    barrier.over.join_all(barrier.next);
    for (Clock* clock : {&barrier.over.seen, &barrier.over.known, &barrier.over.proxied}) {
      (*clock)[barrier.place] = barrier.phase;
    }
  }
  wake(barrier.waiting);
}

void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  if (copy.owner != nullptr) {
    --copy.owner->bulk.under_way;
    return;
  }
  Barrier& barrier = m.barriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  complete(barrier);
}

}  // namespace

void perform_one() {
  const size_t which = m.random() % m.copies.size();
  const Copy copy = m.copies[which];
  m.copies[which] = m.copies.back();
  m.copies.pop_back();
  perform(copy);
}

void* shared_memory(uint64_t bytes) {
  void* at = arena() + m.shared_used;
  m.shared_used += (bytes + 1023) / 1024 * 1024;
  if (m.shared_used > kSharedBytes) fail("more shared memory than there is");
  std::memset(at, 0xa5, bytes);  // not zeros
  return at;
}

const Place& here() { return m.now->place; }
void* dynamic_shared() { return m.now->block->dynamic; }
void* static_shared(int id, uint64_t bytes) {
  void*& at = m.now->block->statics[id];
  if (at == nullptr) at = shared_memory(bytes);
  return at;
}

// ---- words

void acquire_all(const void* address, int bytes) {
  for (uint64_t k = key(address); k * 8 < reinterpret_cast<uint64_t>(address) + bytes; ++k) {
    const auto word = m.words.find(k);
    if (word != m.words.end()) acquired(word->second, m.now);
  }
}

void before_load(const void* address, int bytes) {
  Thread* t = m.now;
  const bool again = t->polled == address && t->polled_same && std::memcmp(t->polled_value, address, bytes) == 0;
  t->polled_same = t->polled == address && t->polled_bytes == bytes;  // so far
  if (!again) {
    give_way();
    return;
  }
  sleep_in(m.words[key(address)].sleepers);
}

void after_load(const void* address, int bytes, uint64_t) {
  Thread* t = m.now;
  t->polled_same = t->polled_same && std::memcmp(t->polled_value, address, bytes) == 0;
  t->polled = address;
  t->polled_bytes = bytes;
  std::memcpy(t->polled_value, address, bytes);
  if (m.checks) acquire_all(address, bytes);
}

void before_store(const void* address, int bytes, bool joins) {
  m.now->polled = nullptr;
  for (uint64_t k = key(address); k * 8 < reinterpret_cast<uint64_t>(address) + bytes; ++k) {
    Word& word = m.words[k];
    wake(word.sleepers);
    if (m.checks) released(word, m.now, joins);
  }
}

uint4 ld_lines(const void* address) {
  Warp* warp = m.now->warp;
  const int lane = m.now->place.thread.x % 32;
  before_load(address, 16);
  warp->line[lane] = const_cast<void*>(address);
  meet(warp->lines, 32, true, [warp] {
    for (int i = 0; i < 32; ++i) std::memcpy(&warp->content[i], warp->line[i], 16);
  });
  const uint4 v = warp->content[lane];
  if (m.checks) acquire_all(address, 16);
  return v;
}

void st_lines(void* address, uint4 v) {
  Warp* warp = m.now->warp;
  const int lane = m.now->place.thread.x % 32;
  warp->line[lane] = address;
  warp->content[lane] = v;
  before_store(address, 16);
  meet(warp->lines, 32, true, [warp] {
    for (int i = 0; i < 32; ++i) std::memcpy(warp->line[i], &warp->content[i], 16);
    for (int i = 0; i < 32; ++i) wake(m.words[key(warp->line[i])].sleepers);
  });
}

// ---- copies

// The accesses of a copy of this thread's next group; `seen`: which stores it may read.
static void accessed_by(Groups& group, void* to, const void* from, uint32_t bytes, const Clock& seen, uint64_t code) {
  if (group.place < 0) group.place = new_place();
  if (!m.checks) return;
  Thread* t = m.now;
  t->dirty = true;
  const As who{static_cast<uint32_t>(group.place), group.committed + 1, code};
  load_as(from, bytes, who, seen);
  store_as(to, bytes, who, t->clocks.seen, t->clocks.known);
}

void async_copy(void* to, const void* from, int bytes) {
  Thread* t = m.now;
  Groups& g = t->async;
  accessed_by(g, to, from, bytes, t->clocks.seen, CODE);
  t->async_copies.push_back({to, from, static_cast<uint32_t>(bytes), 0, t, g.committed + 1, nullptr});
}
void async_commit() { ++m.now->async.committed; }
void async_wait(int pending) {
  Thread* t = m.now;
  Groups& g = t->async;
  const uint32_t until = g.committed > static_cast<uint32_t>(pending) ? g.committed - pending : 0;
  while (!t->async_copies.empty() && t->async_copies.front().group <= until) {
    const Copy& copy = t->async_copies.front();
    std::memcpy(copy.to, copy.from, copy.bytes);
    t->async_copies.pop_front();
  }
  if (!m.checks || g.place < 0) return;
  t->clocks.seen[g.place] = t->clocks.known[g.place] = until;
  t->dirty = true;
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  Thread* t = m.now;
  void* shared = reinterpret_cast<void*>(uint64_t{to});
  if (to % 16 != 0 || reinterpret_cast<uint64_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes == 0) {
    fail("a bulk copy that is not of whole 16 bytes");
  }
  if (m.checks) {
    Barrier& b = m.barriers.at(barrier);
    t->dirty = true;
    const As who{static_cast<uint32_t>(b.place), b.phase + 1, CODE};
    load_as(from, bytes, who, t->clocks.proxied);
    // What threads did there has to be covered by a fence of the proxies, loads too; copies follow copies without one.
    Clock seen = t->clocks.seen, known = t->clocks.known;
    for (size_t thread = 0; thread < m.threads.size(); ++thread)
      seen[thread] = known[thread] = t->clocks.proxied[thread];
    store_as(shared, bytes, who, seen, known);
    tick(t);
  }
  m.copies.push_back({shared, from, bytes, barrier});
}

void bulk_store(uint64_t to, uint32_t from, uint32_t bytes) {
  Thread* t = m.now;
  Groups& g = t->bulk;
  void* place = reinterpret_cast<void*>(to);
  const void* shared = reinterpret_cast<const void*>(uint64_t{from});
  if (from % 16 != 0 || to % 16 != 0 || bytes % 16 != 0) fail("a bulk copy that is not of whole 16 bytes");
  accessed_by(g, place, shared, bytes, t->clocks.proxied, CODE);
  if (m.checks) tick(t);
  ++g.under_way;
  m.copies.push_back({place, shared, bytes, 0, t, g.committed + 1, nullptr});
}
void bulk_commit() { ++m.now->bulk.committed; }
void bulk_wait(int pending, bool only_read) {
  Thread* t = m.now;
  Groups& g = t->bulk;
  if (g.place < 0) return;
  const uint32_t until = g.committed > static_cast<uint32_t>(pending) ? g.committed - pending : 0;
  for (size_t i = 0; i < m.copies.size();) {
    if (m.copies[i].owner != t || m.copies[i].group > until) {
      ++i;
      continue;
    }
    const Copy copy = m.copies[i];
    m.copies[i] = m.copies.back();
    m.copies.pop_back();
    perform(copy);
  }
  if (!m.checks) return;
  t->clocks.known[g.place] = until;
  if (!only_read) t->clocks.seen[g.place] = t->clocks.proxied[g.place] = until;
  t->dirty = true;
}

void barrier_init(uint32_t address, uint32_t count) {
  Barrier& b = m.barriers[address];
  const int place = b.place >= 0 ? b.place : new_place();
  b = Barrier{};
  b.place = place;
  b.count = b.pending = count;
  if (m.checks) b.next.grow(m.places), b.over.grow(m.places);
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
  Thread* t = m.now;
  Barrier& b = m.barriers.at(address);
  if (b.pending == 0) fail("more arrivals at a barrier than it counts");
  if (m.checks) {
    b.next.join_all(t->clocks);
    tick(t);
    t->dirty = true;
  }
  b.bytes += bytes;
  --b.pending;
  complete(b);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  Thread* t = m.now;
  Barrier& b = m.barriers.at(address);
  while ((b.phase & 1) == parity) sleep_in(b.waiting);
  if (!m.checks) return;
  t->clocks.join_all(b.over);
  t->dirty = true;
}

bool barrier_over(uint32_t address, uint32_t parity) {
  if ((m.barriers.at(address).phase & 1) == parity) return false;
  barrier_wait(address, parity);
  return true;
}

}  // namespace emulated
