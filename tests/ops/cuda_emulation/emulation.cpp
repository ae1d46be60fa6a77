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

constexpr size_t kStack = 64 * 1024;
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

// "file.cu:12: " for an address in this library, as far as addr2line is there to tell.
std::string place(void* address) {
  Dl_info info;
  if (!dladdr(address, &info)) return "";
  char command[600], line[400] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' %#zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase)) - 1);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), pipe)) line[0] = 0;
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = 0;
  return line[0] && line[0] != '?' ? std::string(base(line)) + ": " : "";
}

// Whether something orders an access before the one that the current thread makes.
bool ordered(const Access& before, bool shared) {
  if (before.launch != launches) return true;
  if (before.block != block_number) return shared || block_is_atomic;
  if (before.barriers != barriers) return true;
  if (before.thread == current->id) return true;
  return before.warp == current->warp && before.warp_syncs < current->warp_syncs;
}

[[gnu::noinline]] void report_race(void* from, const Region& region, uintptr_t a, const Access& other, bool write,
                                   bool other_writes) {
  char who[80];
  if (other.block != block_number) {
    std::snprintf(who, sizeof(who), "block %lld", static_cast<long long>(other.block));
  } else if (other.thread == kMany) {
    std::snprintf(who, sizeof(who), "other threads");
  } else {
    std::snprintf(who, sizeof(who), "thread %d", other.thread);
  }
  fail("%srace: %s byte %zu of %s that %s %s with no barrier between", place(from).c_str(), write ? "writes" : "reads",
       static_cast<size_t>(a - region.begin), region.shared ? "shared memory" : "a tensor", who,
       other_writes ? "wrote" : "read");
}

[[gnu::noinline]] void check_outside(void* from, uintptr_t a, size_t n, bool write) {
  if (!write && (a < reinterpret_cast<uintptr_t>(static_bytes) || a >= reinterpret_cast<uintptr_t>(std::end(static_bytes))) &&
      a >= reinterpret_cast<uintptr_t>(&__ehdr_start) && a + n <= reinterpret_cast<uintptr_t>(&_end)) {
    return;  // constants
  }
  if (!write && a >= reinterpret_cast<uintptr_t>(host_stack_low) && a + n <= reinterpret_cast<uintptr_t>(host_stack_high)) {
    return;  // the kernel's parameters
  }
  const Region* near = nullptr;
  for (const auto& r : regions) {
    if (r->begin <= a && (!near || r->begin > near->begin)) near = r.get();
  }
  if (dynamic_region.begin <= a && a < dynamic_region.end + 4096) near = &dynamic_region;
  for (const auto& v : statics) {
    if (v->region.begin <= a && a < v->region.end + kGap) near = &v->region;
  }
  char relative[120] = "memory that is no tensor's";
  if (near && a < near->end + (1 << 20)) {
    std::snprintf(relative, sizeof(relative), "at byte %zu of %zu of %s", static_cast<size_t>(a - near->begin),
                  static_cast<size_t>(near->end - near->begin), near->shared ? "shared memory" : "a tensor");
  }
  fail("%soutside: %s %zu bytes, %s", place(from).c_str(), write ? "writes" : "reads", n, relative);
}

Region* find(uintptr_t a) {
  if (last_region && a >= last_region->begin && a < last_region->end) return last_region;
  if (a >= dynamic_region.begin && a < dynamic_region.end) return last_region = &dynamic_region;
  for (const auto& v : statics) {
    if (a >= v->region.begin && a < v->region.end) return last_region = &v->region;
  }
  auto after = std::upper_bound(regions.begin(), regions.end(), a, [](uintptr_t v, const auto& r) { return v < r->begin; });
  if (after == regions.begin()) return nullptr;
  Region* r = std::prev(after)->get();
  return a < r->end ? last_region = r : nullptr;
}

void access(void* from, uintptr_t a, size_t n, bool write) {
  if (!current || n == 0) return;  // the host's own accesses are its own business
  const uintptr_t stack = reinterpret_cast<uintptr_t>(stacks) + static_cast<size_t>(current->id) * kStack;
  if (a >= stack && a < stack + kStack) return;
  Region* r = find(a);
  if (!r) return check_outside(from, a, n, write);
  if (a + n > r->end) return check_outside(from, a, n, write);
  if (write && !r->writable) {
    return fail("%swrites byte %zu of a tensor whose pointer is const", place(from).c_str(), static_cast<size_t>(a - r->begin));
  }
  const size_t first = (a - r->begin) / r->granule, last = (a + n - 1 - r->begin) / r->granule;
  const Access now{launches, block_number, current->id, current->warp, barriers, current->warp_syncs};
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = r->cells[i];
    if (!ordered(cell.write, r->shared)) return report_race(from, *r, a, cell.write, write, true);
    const bool after_reads = ordered(cell.read, r->shared);
    if (write) {
      if (!after_reads) return report_race(from, *r, a, cell.read, write, false);
      cell.write = now;
    } else if (after_reads) {
      cell.read = now;
    } else if (cell.read.block != block_number) {
      cell.read.block = kMany;
    } else {
      cell.read.thread = kMany;
      if (cell.read.warp != current->warp) cell.read.warp = kMany;
      cell.read.warp_syncs = std::max(cell.read.warp_syncs, current->warp_syncs);
    }
  }
}

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
                "%s:%d: %s that not all threads reach: of %d threads %d wait at a barrier, %d ended, and %d wait for lanes "
                "of their warp",
                base(t->file), t->line, barrier ? "a barrier" : "an exchange within a warp", thread_count, at_barrier, ended,
                thread_count - at_barrier - ended);
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
    failure = std::string(kernel_name) + ": " + std::to_string(used) + " bytes of shared memory, of which a block has " +
        std::to_string(shared_limit);
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

Value exchange(Exchange kind, unsigned mask, Value mine, size_t size, int operand, int width, const char* file, int line) {
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
      fail("%s:%d: lane %d of mask %#x comes here while others wait at %s:%d with mask %#x", base(file), line, t.lane, mask,
           base(g.file), g.line, g.mask);
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

void* static_shared(const void* key, size_t size, size_t align) {
  Static* found = nullptr;
  for (const auto& v : statics) {
    if (v->key == key) found = v.get();
  }
  if (!found) {
    const uintptr_t start = statics.empty() ? reinterpret_cast<uintptr_t>(static_bytes) : statics.back()->region.end + kGap;
    const uintptr_t begin = (start + align - 1) / align * align;
    if (begin + size > reinterpret_cast<uintptr_t>(std::end(static_bytes))) fail("more __shared__ variables than a GPU has");
    Region region{begin, begin + size, 1, true, true, std::vector<Cell>(size)};
    statics.push_back(std::make_unique<Static>(Static{key, -1, std::move(region)}));
    found = statics.back().get();
  }
  void* p = reinterpret_cast<void*>(found->region.begin);
  if (found->block != block_number) std::memset(p, 0xff, size);
  found->block = block_number;
  return p;
}

void memory(const void* p, size_t size, bool writable, size_t granule) {
  if (size == 0) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + size;
  const std::lock_guard lock(running);
  for (auto& r : regions) {
    if (r->begin == begin && r->end == end && r->granule <= granule) {
      r->writable |= writable;
      return;
    }
  }
  for (size_t i = regions.size(); i-- > 0;) {  // two views of one storage are one region
    Region& r = *regions[i];
    if (r.end <= begin || end <= r.begin) continue;
    begin = std::min(begin, r.begin);
    end = std::max(end, r.end);
    granule = std::min(granule, r.granule);
    writable |= r.writable;
    regions.erase(regions.begin() + static_cast<long>(i));
  }
  auto made = std::make_unique<Region>(Region{begin, end, granule, writable, false, {}});
  made->cells.resize((end - begin + granule - 1) / granule);
  regions.insert(std::upper_bound(regions.begin(), regions.end(), begin,
                                  [](uintptr_t v, const auto& r) { return v < r->begin; }),
                 std::move(made));
  last_region = nullptr;
}

void tensor(AtenTensorHandle t, const void* p, bool writable) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(t, &dim);
  aoti_torch_get_sizes(t, &sizes);
  aoti_torch_get_strides(t, &strides);
  aoti_torch_get_dtype(t, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const size_t element = aoti_torch_dtype_element_size(dtype);
  memory(p, static_cast<size_t>(last + 1) * element, writable, element);
}

void copied(const void* device, size_t size, bool written) {
  const std::lock_guard lock(running);
  const uintptr_t a = reinterpret_cast<uintptr_t>(device);
  for (const auto& r : regions) {
    if (a >= r->begin && a + size <= r->end && (r->writable || !written)) return;
  }
  throw std::runtime_error("cudaMemcpyAsync or cudaMemsetAsync outside a tensor");
}

void atomic() { block_is_atomic = true; }
void allow_shared(size_t bytes) {
  if (bytes > kSharedBytesOptIn) throw std::runtime_error("cudaFuncSetAttribute: more shared memory than a block can have");
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
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
  }
  host_stack_low = static_cast<char*>(__builtin_frame_address(0));
  host_stack_high = host_stack_low + (64 << 10);
  std::vector<char> storage(config.shared + 48);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(storage.data()) + 31) / 32 * 32 + 16;  // 16 is all that is promised
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

// ---- what the compiler calls

namespace {
[[gnu::noinline]] void undefined_behaviour(const void* data, const char* what, uintptr_t value) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  const auto* at = static_cast<const Location*>(data);
  if (!emulation::current) {
    std::fprintf(stderr, "%s:%u: %s %#zx in host code\n", at->file, at->line, what, static_cast<size_t>(value));
    std::abort();
  }
  emulation::fail("%s:%u: %s %#zx", emulation::base(at->file), at->line, what, static_cast<size_t>(value));
}
}  // namespace

#define ACCESS(n)                                                                                                    \
  void __tsan_read##n(void* p) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, false); }  \
  void __tsan_write##n(void* p) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, true); }  \
  void __tsan_volatile_read##n(void* p) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, false); } \
  void __tsan_volatile_write##n(void* p) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, true); }
#define ATOMIC(bits)                                                                                                  \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) { return *p; }                    \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) { *p = v; }                     \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) {                  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                   \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v,  \
                                                    int, int) {                                                       \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }
#define UNDEFINED(name, what) \
  void __ubsan_handle_##name(void* data, uintptr_t value) { undefined_behaviour(data, what, value); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, false); }
void __tsan_write_range(void* p, size_t n) { emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
UNDEFINED(type_mismatch_v1, "a misaligned or null address")
UNDEFINED(out_of_bounds, "an index outside its array,")
UNDEFINED(shift_out_of_bounds, "a shift out of bounds of")
UNDEFINED(divrem_overflow, "a division by zero of")
UNDEFINED(add_overflow, "an integer overflow from")
UNDEFINED(sub_overflow, "an integer overflow from")
UNDEFINED(mul_overflow, "an integer overflow from")
UNDEFINED(negate_overflow, "an integer overflow from")
}
