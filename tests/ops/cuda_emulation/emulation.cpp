// Runs the blocks of a launch one after another, each block's threads as fibers of one thread of the CPU, and checks
// every access that they make to memory: the compiler calls __tsan_read4 and the like before each one (it thinks that
// ThreadSanitizer is there), and __ubsan_handle_* where an address is misaligned or an index outside its array.
//
// A fiber runs until a barrier or an exchange within its warp. An access is in error
//   outside   - if it is not wholly within a tensor, shared memory, or the thread's own stack;
//   a race    - if another thread accessed the same bytes, one of the two writes, and no barrier lies between: none of
//               the block for threads of one block, no __syncwarp for lanes of one warp, and for two blocks always.
// Shuffles exchange values but order no memory, as CUDA defines them.

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "emulation.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
void fastgpt_emulation_switch(void** save, void* load) __attribute__((visibility("hidden")));
}

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024;  // also a copy of the kernel's parameters, up to 32 KB
constexpr int kMaxThreads = 1024;
constexpr size_t kGap = 256;  // between two __shared__ variables

// ---- switching stacks

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
struct Fiber {
  void* sp = nullptr;
};
asm(R"(
.text
.hidden fastgpt_emulation_switch
.globl fastgpt_emulation_switch
.type fastgpt_emulation_switch, @function
fastgpt_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastgpt_emulation_switch, .-fastgpt_emulation_switch
)");
void start(Fiber& fiber, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // entry's return address, which also aligns its stack as a call would
  *--top = reinterpret_cast<void*>(entry);
  fiber.sp = top - 6;
  std::memset(fiber.sp, 0, 6 * sizeof(void*));
}
void change(Fiber& from, Fiber& to) { fastgpt_emulation_switch(&from.sp, to.sp); }
#else
struct Fiber {
  ucontext_t context;
};
void start(Fiber& fiber, char* stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- what is known of memory

// An access to some bytes: by which thread, and after which barriers.
constexpr int kMany = -1;
struct Access {
  uint64_t launch = 0;
  int64_t block = 0;  // these three: kMany for several
  int thread = 0;
  int warp = 0;
  uint32_t barriers = 0, warp_syncs = 0;
};
struct Cell {
  Access write, read;
};

struct Region {
  uintptr_t begin, end;
  size_t granule;  // bytes a cell stands for
  bool writable;
  bool shared;
  std::vector<Cell> cells;
};

enum class State { ready, barrier, exchange, done };

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  int id, warp, lane, predicate;
  const char* file;
  int line;
  Value result;
  uint32_t warp_syncs;
};

struct Group {  // lanes that came to one exchange
  Exchange kind;
  unsigned mask, arrived;
  size_t size;
  int width;
  const char* file;
  int line;
  Value values[32];
  int operands[32];
};

struct Warp {
  std::vector<Group> groups;
  uint32_t syncs = 0;
};

std::mutex running;
std::vector<std::unique_ptr<Region>> regions;
struct Static {  // a __shared__ variable
  const void* key;
  int64_t block;  // that last began with it
  Region region;
};
std::vector<std::unique_ptr<Static>> statics;  // of the launch
alignas(128) char static_bytes[2 * kSharedBytes];
std::vector<Thread> threads(kMaxThreads);
Warp warps[kMaxThreads / 32];
char* stacks = nullptr;
Fiber scheduler;
Thread* current = nullptr;  // null while the host runs
Region* last_region = nullptr;
Region dynamic_region;
std::string failure;
const char* kernel_name = "";
void (*thread_body)(void*);
void* thread_data;
int thread_count = 0, ended = 0, at_barrier = 0, predicates = 0, barrier_result = 0, guards = 0;
uint32_t barriers = 0;
uint64_t launches = 0;
int64_t block_number = 0;
bool block_is_atomic = false;
size_t shared_limit = kSharedBytes;
char *host_stack_low = nullptr, *host_stack_high = nullptr;

[[noreturn]] void leave() {
  change(current->fiber, scheduler);
  std::abort();  // nothing resumes a thread that failed or ended
}

const char* base(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// The first failure stops the launch. In a thread it leaves the fiber, with no unwinding: the compiler assumes that its
// sanitizers' functions do not throw.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!failure.empty()) {
    if (current) leave();
    return;
  }
  failure = text;
  if (!current) return;
  char where[300];
  std::snprintf(where, sizeof(where), " (%s, block %u %u %u, thread %u %u %u)", kernel_name, blockIdx.x, blockIdx.y,
                blockIdx.z, current->index.x, current->index.y, current->index.z);
  failure += where;
  leave();
}

#include "accesses.h"

// ---- barriers and exchanges

unsigned existing_lanes(const Thread& t) {
  const int lanes = std::min(32, thread_count - t.warp * 32);
  return lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
}

unsigned ended_lanes(const Thread& t) {
  unsigned mask = ~existing_lanes(t);
  for (int lane = 0; lane < 32 && t.warp * 32 + lane < thread_count; ++lane) {
    if (threads[t.warp * 32 + lane].state == State::done) mask |= 1u << lane;
  }
  return mask;
}

void release_barrier() {
  barrier_result = predicates;
  predicates = at_barrier = 0;
  ++barriers;
  for (int i = 0; i < thread_count; ++i) threads[i].state = State::ready;
}

// The lane that `lane` reads; what CUDA leaves undefined is an error.
int source_lane(const Group& g, int lane) {
  const int first = lane & ~(g.width - 1), end = first + g.width, operand = g.operands[lane];
  int source = lane;
  switch (g.kind) {
    case Exchange::shuffle: source = first + operand; break;
    case Exchange::shuffle_up: source = lane - operand < first ? lane : lane - operand; break;
    case Exchange::shuffle_down: source = lane + operand >= end ? lane : lane + operand; break;
    case Exchange::shuffle_xor: source = (lane ^ operand) >= end ? lane : lane ^ operand; break;
    default: break;
  }
  return source;
}

void complete(Warp& warp, size_t index, int first_thread) {
  const Group g = warp.groups[index];
  warp.groups.erase(warp.groups.begin() + static_cast<long>(index));
  if (g.kind == Exchange::sync) ++warp.syncs;
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((g.arrived >> lane & 1) && g.kind == Exchange::ballot && g.values[lane].bytes[0]) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(g.arrived >> lane & 1)) continue;
    Thread& t = threads[first_thread + lane];
    t.state = State::ready;
    if (g.kind == Exchange::sync) {
      t.warp_syncs = warp.syncs;
    } else if (g.kind == Exchange::ballot) {
      t.result = to_value(ballot);
    } else {
      const int source = source_lane(g, lane);
      if (!(g.arrived >> source & 1)) {
        return fail("%s:%d: a shuffle reads lane %d, which takes no part in it", base(g.file), g.line, source);
      }
      t.result = g.values[source];
    }
  }
}

void complete_groups(const Thread& t) {
  Warp& warp = warps[t.warp];
  const unsigned gone = ended_lanes(t);
  for (size_t i = 0; i < warp.groups.size(); ++i) {
    const Group& g = warp.groups[i];
    if (g.arrived && ((g.arrived | gone) & g.mask) == g.mask) return complete(warp, i, t.warp * 32);
  }
}

void fiber_entry() {
  thread_body(thread_data);
  current->state = State::done;
  ++ended;
  complete_groups(*current);
  leave();
}

std::string stuck() {
  char text[400];
  const Thread* barrier = nullptr;
  const Thread* exchange = nullptr;
  for (int i = 0; i < thread_count; ++i) {
    if (threads[i].state == State::barrier && !barrier) barrier = &threads[i];
    if (threads[i].state == State::exchange && !exchange) exchange = &threads[i];
  }
  const Thread* t = barrier ? barrier : exchange;
  std::snprintf(text, sizeof(text),
                "%s:%d: %s that not all threads reach: of %d threads %d wait at a barrier, %d ended, and %d wait for "
                "lanes of their warp",
                base(t->file), t->line, barrier ? "a barrier" : "an exchange within a warp", thread_count, at_barrier,
                ended, thread_count - at_barrier - ended);
  if (barrier && exchange) {
    const size_t used = std::strlen(text);
    std::snprintf(text + used, sizeof(text) - used, " at %s:%d", base(exchange->file), exchange->line);
  }
  return text;
}

void resume(Thread& t) {
  current = &t;
  threadIdx = t.index;
  change(scheduler, t.fiber);
  current = nullptr;
}

void run_block(const Config& config, int order) {
  barriers += 2;  // what the block before did to shared memory is over
  at_barrier = predicates = ended = 0;
  block_is_atomic = false;
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.id = i;
    t.warp = i / 32;
    t.lane = i % 32;
    t.index = {i % config.block.x, i / config.block.x % config.block.y, i / (config.block.x * config.block.y)};
    t.state = State::ready;
    t.warp_syncs = 0;
    if (t.lane == 0) warps[t.warp] = {};
    start(t.fiber, stacks + static_cast<size_t>(i) * kStack, fiber_entry);
  }
  while (ended < thread_count) {
    bool moved = false;
    for (int i = 0; i < thread_count; ++i) {
      Thread& t = threads[order == 0 ? i : thread_count - 1 - i];
      if (t.state != State::ready) continue;
      moved = true;
      resume(t);
      if (!failure.empty()) return;
    }
    if (!moved) {
      failure = stuck() + " (" + kernel_name + ")";
      return;
    }
  }
  size_t used = dynamic_region.end - dynamic_region.begin;
  for (const auto& v : statics) used += v->region.end - v->region.begin;
  if (used > shared_limit) {
    failure = std::string(kernel_name) + ": " + std::to_string(used) + " bytes of shared memory, of which a block has "
        + std::to_string(shared_limit);
  }
}

}  // namespace

int barrier(int predicate, const char* file, int line) {
  Thread& t = *current;
  for (int i = 0; i < thread_count && at_barrier > 0; ++i) {
    if (threads[i].state != State::barrier) continue;
    if (threads[i].line != line || std::strcmp(threads[i].file, file) != 0) {
      fail("%s:%d: a barrier that thread %d does not reach: it is at the one of %s:%d", base(file), line, i,
           base(threads[i].file), threads[i].line);
    }
    break;
  }
  t.file = file;
  t.line = line;
  t.state = State::barrier;
  predicates += predicate;
  if (++at_barrier == thread_count) release_barrier();
  change(t.fiber, scheduler);
  return barrier_result;
}

Value exchange(
    Exchange kind, unsigned mask, Value mine, size_t size, int operand, int width, const char* file, int line) {
  Thread& t = *current;
  Warp& warp = warps[t.warp];
  if (!(mask >> t.lane & 1)) fail("%s:%d: lane %d is not in its own mask %#x", base(file), line, t.lane, mask);
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s:%d: a width of %d", base(file), line, width);
  if (operand < 0 || operand >= width) {
    fail("%s:%d: a shuffle by %d in a width of %d", base(file), line, operand, width);
  }
  Group* group = nullptr;
  for (Group& g : warp.groups) {
    if (!(g.mask & mask)) continue;
    if (g.mask != mask || g.kind != kind || g.size != size || g.width != width || g.line != line ||
        std::strcmp(g.file, file) != 0) {
      fail("%s:%d: lane %d of mask %#x comes here while others wait at %s:%d with mask %#x", base(file), line, t.lane,
           mask, base(g.file), g.line, g.mask);
    }
    group = &g;
  }
  if (!group) {
    warp.groups.push_back({kind, mask, 0, size, width, file, line, {}, {}});
    group = &warp.groups.back();
  }
  group->arrived |= 1u << t.lane;
  group->values[t.lane] = mine;
  group->operands[t.lane] = operand;
  t.file = file;
  t.line = line;
  t.state = State::exchange;
  complete_groups(t);
  change(t.fiber, scheduler);
  return t.result;
}

void* dynamic_shared() { return reinterpret_cast<void*>(dynamic_region.begin); }

#include "regions.h"

void atomic() { block_is_atomic = true; }
void allow_shared(size_t bytes) {
  if (bytes > kSharedBytesOptIn) throw std::runtime_error("cudaFuncSetAttribute: more shared memory than a block has");
  shared_limit = std::max(shared_limit, bytes);
}
void guard(int change) {
  guards += change;
  if (guards == 1 && change == 1) {  // an op begins: the tensors of the one before may be gone
    const std::lock_guard lock(running);
    regions.clear();
    last_region = nullptr;
  }
}

void run(const char* kernel, const Config& config, void (*thread)(void*), void* data) {
  const std::lock_guard lock(running);
  const size_t count = static_cast<size_t>(config.block.x) * config.block.y * config.block.z;
  const std::string name = kernel;
  if (guards < 1) throw std::runtime_error(name + ": launched without a DeviceGuard, so maybe on another GPU");
  if (count < 1 || count > kMaxThreads || config.block.z > 64) throw std::runtime_error(name + ": invalid block size");
  if (config.grid.x < 1 || config.grid.y < 1 || config.grid.z < 1 || config.grid.x > 0x7fffffffu ||
      config.grid.y > 65535 || config.grid.z > 65535) {
    throw std::runtime_error(name + ": invalid grid");
  }
  if (config.shared > shared_limit) throw std::runtime_error(name + ": more dynamic shared memory than was allowed");
  if (!stacks) {
    stacks = static_cast<char*>(
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
             0));
    if (stacks == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
  }
  host_stack_low = static_cast<char*>(__builtin_frame_address(0));
  host_stack_high = host_stack_low + (128 << 10);
  std::vector<char> storage(config.shared + 48);
  // On 16 bytes and no more, which is all that is promised.
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(storage.data()) + 31) / 32 * 32 + 16;
  dynamic_region = {aligned, aligned + config.shared, 1, true, true, std::vector<Cell>(config.shared)};
  kernel_name = kernel;
  thread_body = thread;
  thread_data = data;
  thread_count = static_cast<int>(count);
  blockDim = config.block;
  gridDim = config.grid;
  failure.clear();
  statics.clear();
  last_region = nullptr;
  ++launches;
  const int order = static_cast<int>(launches % 2);  // threads and blocks from the first or from the last
  const int64_t blocks = static_cast<int64_t>(config.grid.x) * config.grid.y * config.grid.z;
  for (int64_t i = 0; i < blocks && failure.empty(); ++i) {
    block_number = order == 0 ? i : blocks - 1 - i;
    blockIdx = {static_cast<unsigned>(block_number % config.grid.x),
                static_cast<unsigned>(block_number / config.grid.x % config.grid.y),
                static_cast<unsigned>(block_number / config.grid.x / config.grid.y)};
    std::memset(reinterpret_cast<void*>(aligned), 0xff, config.shared);
    run_block(config, order);
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace emulation

#include "sanitizers.h"
