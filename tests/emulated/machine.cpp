// A GPU on one thread of a CPU: every thread of every block of every kernel that has been launched is a fiber, all of
// them run by turns, and every access to memory is checked against what the others did.
//
// Order. Each thread has three vector clocks (FastTrack, Flanagan and Freund 2009, has the rest). `seen`: whose stores
// are visible to it, by barriers, by words that were stored after a fence of enough scope, and by copies that it waited
// for. `known`: who is past what, which any word or collective tells, fence or not: a thread that has used what it
// loaded may be overwritten. `proxied`: of what it has seen, what a bulk copy sees too, by a fence of the proxies. A
// load or store needs earlier stores of others in `seen` (of a bulk copy's source: in `proxied`), a store needs earlier
// loads in `known` (where a bulk copy fills shared memory: loads and stores of threads in `proxied`). A word's load
// counts as acquiring: exchange.cuh says at [A] why it may.
//
// Copies that go on by themselves are performed at some later turn. What they write is seen by whoever waits for their
// barrier or group: a barrier, and a thread for each kind of its groups, has a place in the clocks of its own.
//
// Turns are taken at random from a seed. A thread that polls a word sleeps until somebody stores there; when all sleep,
// time goes on by a millisecond, so that waits for a lost peer end. When it goes on for longer than a call may take,
// the run is stuck and says so.
#include "state.h"

#include <sys/mman.h>

namespace emulated {

Machine m;

namespace {

constexpr uint64_t kStack = 128 << 10, kStuckNs = 60'000'000'000, kIdleNs = 1'000'000;

// ---- fibers

extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

void leave() {
  Thread* t = m.now;
  m.now = nullptr;
  emulated_switch(&t->stack_pointer, m.home);
}

}  // namespace

void give_way() {
  m.ready.push_back(m.now);
  leave();
}
void wake(std::vector<Thread*>& some) {
  for (Thread* t : some) {
    if (t->asleep) {
      t->asleep = false;
      m.ready.push_back(t);
    }
  }
  some.clear();
}
void sleep_in(std::vector<Thread*>& some) {
  m.now->asleep = true;
  some.push_back(m.now);
  leave();
}

namespace {

void finish();
void enter() {
  m.now->block->kernel->run();
  finish();
}

void prepare(Thread* t) {
  uint64_t* top = reinterpret_cast<uint64_t*>(t->stack + kStack);
  *--top = 0;  // where `enter` would return to
  *--top = reinterpret_cast<uint64_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  t->stack_pointer = top;
}

// ---- kernels

void start(Kernel* k) {
  k->started = true;
  for (int b = 0; b < k->blocks; ++b) {
    m.blocks.push_back(std::make_unique<Block>());
    Block* block = m.blocks.back().get();
    block->kernel = k;
    block->dynamic = shared_memory(k->shared_bytes);
    for (int i = 0; i < k->threads; ++i) {
      if (i % 32 == 0) block->warps.push_back(std::make_unique<Warp>());
      Thread* t = m.threads[m.used_threads].get();
      t->index = m.used_threads++;
      t->block = block;
      t->warp = block->warps.back().get();
      t->place =
          Place{{static_cast<unsigned>(i), 0, 0}, {static_cast<unsigned>(b), 0, 0}, dim3(k->threads), dim3(k->blocks)};
      if (m.checks) {
        t->clocks.grow(m.places);
        if (!k->overlaps && k->before != nullptr) t->clocks = k->before->last;
        t->clocks.proxied = t->clocks.seen;
        t->clocks.seen[t->index] = t->clocks.known[t->index] = 1;
      }
      prepare(t);
      m.ready.push_back(t);
    }
  }
}

bool is_over(const Kernel* k) { return k == nullptr || (k->started && k->left == 0 && is_over(k->before)); }

void start_what_may() {
  for (auto& k : m.kernels) {
    if (k->started) continue;
    const Kernel* before = k->before;
    if (is_over(before) || (k->overlaps && before->started && before->not_triggered == 0)) start(k.get());
  }
}

void over(Kernel* k) {
  if (m.checks && k->before != nullptr) k->last.join_all(k->before->last);
  for (auto& next : m.kernels) {
    if (next->before == k) wake(next->waiting);
  }
  start_what_may();
}

void finish() {
  Thread* t = m.now;
  Kernel* k = t->block->kernel;
  t->done = true;
  if (t->bulk.under_way != 0) m.failure = "a thread ended with bulk copies under way";
  if (m.checks) {
    k->last.grow(m.places);
    join(k->last.seen, t->clocks.seen);
    k->last.known = k->last.proxied = k->last.seen;
  }
  launch_dependents();
  if (--k->left == 0) over(k);
  leave();
}

void describe() {
  std::map<std::string, int> where;
  for (auto& t : m.threads) {
    if (t->block != nullptr && !t->done) ++where[t->block->kernel->name];
  }
  m.failure = "stuck:";
  for (auto& one : where) m.failure += " " + std::to_string(one.second) + " threads of kernels of " + one.first + ";";
}

}  // namespace

void fail(const char* what) {
  m.failure = what;
  if (m.now == nullptr) throw std::runtime_error(what);
  leave();  // for good
  std::abort();
}

void wait_for_earlier() {
  Kernel* k = m.now->block->kernel;
  while (!is_over(k->before)) sleep_in(k->waiting);
  if (!m.checks || k->before == nullptr) return;
  m.now->clocks.join_all(k->before->last);
  m.now->dirty = true;
}

void launch_dependents() {
  Thread* t = m.now;
  Kernel* k = t->block->kernel;
  if (t->place.threads.z == 0) return;  // has told
  t->place.threads.z = 0;
  if (--k->not_triggered == 0) start_what_may();
}

uint64_t now_ns() {
  give_way();
  return m.time;
}

void launch(uint64_t stream, int blocks, int threads, uint64_t shared_bytes, bool overlaps, const std::string& name,
            std::function<void()> kernel) {
  auto k = std::make_unique<Kernel>();
  k->stream = stream, k->blocks = blocks, k->threads = threads, k->shared_bytes = shared_bytes;
  k->overlaps = overlaps, k->name = name, k->run = std::move(kernel);
  k->left = k->not_triggered = blocks * threads;
  for (auto& other : m.kernels) {
    if (other->stream == stream) k->before = other.get();
  }
  m.kernels.push_back(std::move(k));
}

// Everything that has been launched, to its end. Returns what went wrong, lines of text: nothing, or a failure, or
// races as "race TIMES CODE CODE what".
std::string run(uint64_t seed, bool checks) {
  m.random.seed(seed);
  m.checks = checks;
  m.failure.clear();
  size_t num = 0;
  for (auto& k : m.kernels) num += static_cast<size_t>(k->blocks) * k->threads;
  m.places = 3 * num + 4096;
  m.stacks_bytes = num * kStack;
  m.stacks = static_cast<uint8_t*>(
      mmap(nullptr, m.stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t i = 0; i < num; ++i) {
    m.threads.push_back(std::make_unique<Thread>());
    m.threads.back()->stack = m.stacks + i * kStack;
  }
  m.used_places = num;
  m.time = m.idle_since = 0;
  start_what_may();
  const auto left = [] {
    return std::any_of(m.kernels.begin(), m.kernels.end(), [](const auto& k) { return k->left != 0; });
  };
  while (m.failure.empty() && left()) {
    if (!m.copies.empty() && (m.ready.empty() || m.random() % 16 == 0)) {
      perform_one();
      continue;
    }
    if (m.ready.empty()) {
      m.time += kIdleNs;
      if (m.time > kStuckNs) {
        describe();
        break;
      }
      for (auto& word : m.words) wake(word.second.sleepers);
      if (m.ready.empty()) {
        describe();
        break;
      }
      continue;
    }
    // Mostly one after another, which is quick, and sometimes any.
    static size_t next = 0;
    const size_t which = m.random() % 8 == 0 ? m.random() % m.ready.size() : next++ % m.ready.size();
    Thread* t = m.ready[which];
    m.ready[which] = m.ready.back();
    m.ready.pop_back();
    m.now = t;
    m.time += 10;
    emulated_switch(&m.home, t->stack_pointer);
  }
  while (!m.copies.empty() && m.failure.empty()) perform_one();
  std::string told = m.failure.empty() ? "" : "failed " + m.failure + "\n";
  for (auto& race : m.races) {
    char text[96];
    std::snprintf(text, sizeof(text), "race %lu %lx %lx ", static_cast<unsigned long>(race.second.first),
                  static_cast<unsigned long>(std::get<1>(race.first)),
                  static_cast<unsigned long>(std::get<2>(race.first)));
    told += text + race.second.second + "\n";
  }
  munmap(m.stacks, m.stacks_bytes);
  const std::mt19937_64 random = m.random;
  m = Machine{};
  m.random = random;
  return told;
}

}  // namespace emulated

extern "C" const char* emulated_run(uint64_t seed, int checks) {
  static std::string told;
  told = emulated::run(seed, checks != 0);
  return told.c_str();
}

extern "C" const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
