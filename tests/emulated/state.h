// What the parts of the emulated GPU share: threads, blocks, kernels, words, barriers, and whose clocks say what. The
// comment of machine.cpp is the place to begin.
#pragma once

#include "machine.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulated {

constexpr uint32_t kSharedBase = 0x10000000, kSharedBytes = 0x60000000;  // addresses of shared memory have 32 bits

using Clock = std::vector<uint32_t>;

void join(Clock& to, const Clock& from);  // the later of both, place by place

struct Clocks {
  Clock seen, known, proxied;
  void grow(size_t size) { seen.resize(size), known.resize(size), proxied.resize(size); }
  void join_all(const Clocks& from) {
    join(seen, from.seen);
    join(known, from.known);
    join(proxied, from.proxied);
  }
};
using Snapshot = std::shared_ptr<const Clocks>;

struct Block;
struct Kernel;

struct Meeting {  // of a warp, or at a barrier
  int count = 0;
  Clocks clocks;
  std::vector<struct Thread*> waiting;
};

struct Warp {
  uint64_t in[32], out[32];
  void* line[32];
  uint4 content[32];
  Meeting values, order, lines;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t barrier;  // of a load
  struct Thread* owner = nullptr;
  uint32_t group = 0;
  Snapshot base;
};

struct Groups {    // of the copies of one thread
  int place = -1;  // in the clocks
  uint32_t committed = 0, open = 0, under_way = 0;
};

struct Thread {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in all
  Place place;
  bool done = false, asleep = false, dirty = true;
  Clocks clocks;
  Snapshot cached, fenced[3];
  const void* polled = nullptr;  // the word of the last load
  uint8_t polled_value[16] = {};
  int polled_bytes = 0;
  bool polled_same = false;
  Groups async, bulk;
  std::deque<Copy> async_copies;
};

struct Block {
  Kernel* kernel = nullptr;
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<int, Meeting> barriers;
  std::map<int, void*> statics;
  void* dynamic = nullptr;
};

struct Kernel {
  uint64_t stream;
  int blocks, threads;
  uint64_t shared_bytes;
  bool overlaps, started = false;
  std::string name;
  std::function<void()> run;
  Kernel* before = nullptr;
  int left = 0, not_triggered = 0;
  std::vector<Thread*> waiting;  // for the kernel before
  Clocks last;
};

struct Word {
  Snapshot released[3], now;
  const Block* writer = nullptr;
  std::vector<Thread*> sleepers;
};

struct Barrier {
  int place = -1;
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  Clocks next, over;
  std::vector<Thread*> waiting;
};

struct Access {
  uint32_t place = 0, time = 0;
  uint64_t code = 0;
};
struct Cell {
  Access store;
  std::vector<Access> loads;
};

// Everything that is there while kernels run.
struct Machine {
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> ready;
  std::unordered_map<uint64_t, Word> words;
  std::unordered_map<uint64_t, Barrier> barriers;
  std::unordered_map<uint64_t, std::unique_ptr<Cell[]>> pages;
  std::vector<Copy> copies;
  std::map<std::tuple<int, uint64_t, uint64_t>, std::pair<uint64_t, std::string>> races;
  std::string failure;
  std::mt19937_64 random;
  Thread* now = nullptr;
  void* home = nullptr;
  uint8_t* stacks = nullptr;
  uint64_t stacks_bytes = 0, time = 0, idle_since = 0, shared_used = 0;
  size_t places = 0, used_places = 0;  // of clocks: threads first, then barriers and groups as they come
  int used_threads = 0;
  bool checks = false;
};
extern Machine m;

// ---- turns (machine.cpp)
void give_way();                            // the thread that runs comes again
void sleep_in(std::vector<Thread*>& some);  // until `wake`
void wake(std::vector<Thread*>& some);

// ---- order (order.cpp)
void tick(Thread* t);
int new_place();
struct As {  // who accesses memory, and when
  uint32_t place, time;
  uint64_t code;
};
void load_as(const void* from, uint32_t bytes, const As& who, const Clock& seen);
void store_as(void* to, uint32_t bytes, const As& who, const Clock& seen, const Clock& known);
void plain(const void* address, int bytes, bool stores, uint64_t code);
// The last of `count` to come passes everybody's clocks on; `only_known`: a collective.
void meet(Meeting& meeting, int count, bool only_known, const std::function<void()>& last = nullptr);
void released(Word& word, Thread* t, bool joins);
void acquired(const Word& word, Thread* t);

// ---- memory and copies (instructions.cpp)
void* shared_memory(uint64_t bytes);
void perform_one();  // of the copies under way

inline uint64_t key(const void* address) { return reinterpret_cast<uint64_t>(address) >> 3; }
inline uint64_t caller(void* address) { return reinterpret_cast<uint64_t>(address) - 1; }
#define CODE emulated::caller(__builtin_return_address(0))

}  // namespace emulated
