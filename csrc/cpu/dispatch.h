// Which build of the CPU kernels runs: the best one that this machine has, or the one DEQKERN_ISA names.
#pragma once
#include "../anderson_gram.h"
#include "../anderson_mix.h"
#include "../anderson_solve.h"
#include "../band_moments.h"
#include "../dct2.h"
#include "../ddim_scan.h"
#include "../extrapolate_states.h"
#include "../interpolate_outputs.h"
#include "../update_convergence.h"
#include "../secant_slope.h"

namespace deqkern {

struct Kernels {
  const char* name;
  void (*dct2)(const Dct2&);
  void (*ddim_scan)(const DdimScan&);
  void (*band_moments)(const BandMoments&);
  void (*secant_slope)(const SecantSlope&);
  void (*interpolate_outputs)(const InterpolateOutputs&);
  void (*extrapolate_states)(const ExtrapolateStates&);
  void (*anderson_gram)(const AndersonGram&);
  void (*anderson_solve)(const AndersonSolve&);
  void (*anderson_mix)(const AndersonMix&);
  void (*update_convergence)(const UpdateConvergence&);
};

const Kernels& kernels();              // throws std::runtime_error when DEQKERN_ISA names one that is not available
const char* available_isa(int place);  // best first; null after the last

}  // namespace deqkern
